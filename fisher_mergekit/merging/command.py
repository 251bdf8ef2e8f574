"""What is known of the command that plans a merge: mergekit hands a planner no more than a recipe.

Merges in memory have no command.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from fisher_mergekit.recipe.reading import dropped_keys, read_yaml


def is_one_of_several() -> bool:
    """Whether the recipe is one of several in a file for mergekit-multi."""
    return _script() == "multimerge"


def dropped() -> list[str]:
    """Say which keys of the recipe's file mergekit-yaml has dropped in silence.

    `parameters` reach the planner as they are; a `lambda` that stands beside them does not, and
    the merge would be another one.
    """
    recipe = _recipe()
    return [] if recipe is None else dropped_keys(read_yaml(Path(recipe)))


def recipe() -> str:
    """Return the recipe's file as it was typed, for a shell; RECIPE where nobody typed one."""
    typed = _recipe()
    return "RECIPE" if typed is None else shlex.quote(typed)


def _recipe() -> str | None:
    if _script() != "run_yaml":
        return None
    typed: str = click.get_current_context().params["config_file"]
    return typed


def _script() -> str | None:
    context = click.get_current_context(silent=True)
    callback: Any = context.command.callback if context is not None else None
    package, _, name = getattr(callback, "__module__", "").rpartition(".")
    return name if package == "mergekit.scripts" else None
