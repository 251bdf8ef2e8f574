"""Keys of a recipe that mergekit would drop in silence: misspelt, in the wrong place, unknown."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from mergekit.config import (
    InputModelDefinition,
    InputSliceDefinition,
    MergeConfiguration,
    OutputModuleDefinition,
    OutputSliceDefinition,
)

from fisher_mergekit.errors import nearest
from fisher_mergekit.methods import METHODS
from fisher_mergekit.recipe.blocks import Block, blocks
from fisher_mergekit.recipe.parameters import MODEL_KEYS

LOG = logging.getLogger(__name__)

NEAR = 0.75
"""How alike two words are that are one misspelt; `params` and `parameters` are just that."""

CALIBRATION = "calibration"
"""Our one key that stands beside `parameters`."""

OWN = "x-"
"""How a key begins that is the user's own, as in other tools' YAML."""

UNREAD = frozenset({"residual_weight"})
"""Keys that mergekit takes, and never looks at."""

_KNOWN_SOMEWHERE = {
    key
    for block in (
        MergeConfiguration,
        OutputModuleDefinition,
        OutputSliceDefinition,
        InputModelDefinition,
        InputSliceDefinition,
    )
    for key in block.model_fields
} | {CALIBRATION}


def dropped_keys(config: MergeConfiguration, content: Mapping[str, Any]) -> list[str]:
    """Say which keys of a recipe have no effect where they stand, though they were meant to.

    People keep notes and YAML anchors in the recipe's first level, so what is like no known word
    stays there; further down a warning tells of it. Nothing is said of what begins with `x-`.

    Args:
        config: a recipe for one of our methods, as mergekit understands it.
        content: as it is written.
    """
    ours = (*MODEL_KEYS, "exclude", *METHODS[config.merge_method].keys)
    problems, ignored = [], []
    for block in blocks(config, content):
        known = {*block.fields, *([CALIBRATION] if block.is_whole or block.is_model else [])}
        for key in map(str, block.written):
            if key in known - UNREAD or key.startswith(OWN):
                continue
            problem = _problem(key, block, known - UNREAD, ours)
            if problem:
                problems.append(problem)
            elif not block.is_whole:
                ignored.append(f"{key!r} of {block.where}")
    if ignored:
        LOG.warning("mergekit does not know and ignores %s.", ", ".join(ignored))
    return problems


def _problem(key: str, block: Block, known: set[str], ours: tuple[str, ...]) -> str:
    """Return what is wrong with a key that mergekit drops, or nothing."""
    if "parameters" not in block.fields:  # of tokens, or a filter
        near = nearest(key, known, cutoff=NEAR)
        return f"{block.where}: unknown key {key!r}.{near}" if near else ""
    if key in ours:
        return f"{key!r} of {block.where} has no effect there; write it under `parameters:`."
    if key in _KNOWN_SOMEWHERE:
        return f"{key!r} of {block.where} has no effect there; mergekit does not look at it."
    if near := nearest(key, known, cutoff=NEAR):
        return f"{block.where}: unknown key {key!r}.{near}"
    if near := nearest(key, ours, cutoff=NEAR):
        return f"{block.where}: unknown key {key!r}.{near} Write that under `parameters:`."
    return ""
