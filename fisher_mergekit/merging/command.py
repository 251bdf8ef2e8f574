"""What is known of the command that plans a merge: mergekit hands a planner no more than a recipe.

Merges in memory have no command.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import yaml

from fisher_mergekit.methods import METHODS
from fisher_mergekit.recipe import parse_config
from fisher_mergekit.recipe.dropped import dropped_keys
from fisher_mergekit.shell import word

SCRIPTS = ("run_yaml", "multimerge")
"""mergekit's commands that read recipes from files, by the names of their modules."""


def is_one_of_several() -> bool:
    """Whether the recipe is one of several in a file for mergekit-multi."""
    return _script() == "multimerge"


def dropped() -> list[str]:
    """Say which keys of the recipe's file mergekit has dropped in silence.

    `parameters` reach the planner as they are; a `lambda` that stands beside them does not, and
    the merge would be another one. Of several recipes in one file all of ours are looked at.
    """
    return [
        f"stage {stage}: {problem}" if stage else problem
        for stage, content in _contents()
        for problem in dropped_keys(parse_config(content, where="the recipe"), content)
    ]


def _contents() -> Iterator[tuple[str | None, Mapping[str, Any]]]:
    """Yield our recipes in the file, each with the name that it has for mergekit-multi."""
    typed = _recipe()
    if typed is None:
        return
    for content in yaml.safe_load_all(Path(typed).read_text(encoding="utf-8")):
        if content["merge_method"] in METHODS:
            name = content.pop("name", None) if is_one_of_several() else None
            yield name, content


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
