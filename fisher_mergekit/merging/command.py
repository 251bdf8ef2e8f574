"""What is known of the command that plans a merge: mergekit hands a planner no more than a recipe.

Merges in memory have no command.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import yaml

from fisher_mergekit.errors import RecipeError
from fisher_mergekit.methods import METHODS
from fisher_mergekit.recipe import parse_config
from fisher_mergekit.recipe.dropped import dropped_keys
from fisher_mergekit.recipe.written import read_text
from fisher_mergekit.shell import word

SCRIPTS = ("run_yaml", "multimerge")
"""mergekit's commands that read recipes from files, by the names of their modules."""


def is_one_of_several() -> bool:
    """Whether the recipe is one of several in a file for mergekit-multi."""
    return _script() == "multimerge"


def dropped() -> list[str]:
    """Say which keys of the recipe's file mergekit has dropped in silence.

    `parameters` reach the planner as they are; a `lambda` that stands beside them does not, and
    the merge would be another one. Of several recipes in one file all of ours are looked at when
    the first of them is planned, and not again: until the last one the file may have changed.
    """
    context = click.get_current_context(silent=True)
    typed = _recipe()
    if context is None or typed is None:
        return []
    if __name__ not in context.meta:
        context.meta[__name__] = list(_dropped(Path(typed)))
    found: list[str] = context.meta[__name__]
    return found


def _dropped(path: Path) -> Iterator[str]:
    try:
        for written in read_text(path.read_text(encoding="utf-8")):
            content = written.content
            if not isinstance(content, dict) or content.get("merge_method") not in METHODS:
                continue
            stage = content.pop("name", None) if is_one_of_several() else None
            for problem in dropped_keys(parse_config(content, where="the recipe"), written):
                yield f"stage {stage}: {problem}" if stage else problem
    except (OSError, ValueError, RecursionError, yaml.YAMLError, RecipeError):
        return  # it has changed since mergekit has read it, and what is merged is what it was


def recipe() -> str:
    """Return the recipe's file as it was typed, for a shell; RECIPE where nobody typed one."""
    typed = _recipe()
    return "RECIPE" if typed is None else word(typed)


def _recipe() -> str | None:
    """Return the file, if there is one that can be read again: a pipe has nothing more to say."""
    if _script() not in SCRIPTS:
        return None
    typed: str = click.get_current_context().params["config_file"]
    return typed if Path(typed).is_file() else None


def _script() -> str | None:
    """Return which of mergekit's scripts runs, as its own command or by `python -m`."""
    context = click.get_current_context(silent=True)
    callback: Any = context.command.callback if context is not None else None
    module = getattr(callback, "__module__", "")
    if module == "__main__":
        module = getattr(sys.modules["__main__"].__spec__, "name", "")
    package, _, name = module.rpartition(".")
    return name if package == "mergekit.scripts" else None
