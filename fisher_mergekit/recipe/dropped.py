"""Keys of a recipe that mergekit would drop in silence: misspelt, in the wrong place, unknown."""

from __future__ import annotations

import logging

from mergekit.config import (
    InputModelDefinition,
    InputSliceDefinition,
    MergeConfiguration,
    OutputModuleDefinition,
    OutputSliceDefinition,
)

from fisher_mergekit.errors import nearest
from fisher_mergekit.methods import METHODS, Method
from fisher_mergekit.recipe.blocks import Block, blocks
from fisher_mergekit.recipe.parameters import MODEL_KEYS
from fisher_mergekit.recipe.written import Written

LOG = logging.getLogger(__name__)

NEAR = 0.75
"""How alike two words are that are one misspelt; `params` and `parameters` are just that."""

NEARER = 0.85
"""Likewise in the first level, where people keep notes (`license` is 0.77 of `slices`)."""

CALIBRATION = "calibration"
"""Our one key that stands beside `parameters`."""

OWN = "x-"
"""How a key begins that is the user's own, as in other tools' YAML."""

NAME = "name"
"""What mergekit-multi calls a recipe by; people write it in others, too."""

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


def dropped_keys(config: MergeConfiguration, written: Written) -> list[str]:
    """Say which keys of a recipe have no effect where they stand, though they were meant to.

    A warning tells of keys that are like no known word. Nothing is said of those that begin with
    `x-`, of a recipe's `name`, and of YAML anchors in the first level.

    Args:
        config: a recipe for one of our methods, as mergekit understands it.
        written: the recipe.
    """
    method = METHODS[config.merge_method]
    problems, ignored = [], []
    for block in blocks(config, written.content):
        known = {*block.fields, *([CALIBRATION] if block.is_whole or block.is_model else [])}
        if block.is_whole:
            meant = {*known, *_ours(method)}
            problems += [problem for first, problem in written.repeated if first in meant]
        for key, value in block.written.items():
            key = str(key)
            is_known = key in known and (key not in UNREAD or value is None)
            if is_known or key.startswith(OWN) or (block.is_whole and key == NAME):
                continue
            problem = _problem(key, block, known - UNREAD, method)
            is_anchor = block.is_whole and key in written.anchors
            if problem and not is_anchor:
                problems.append(problem)
            elif nearest(key, known, cutoff=NEARER) or not is_anchor:
                ignored.append(f"{key!r} of {block.where}")
    if ignored:
        LOG.warning("mergekit does not know and ignores %s.", ", ".join(ignored))
    return problems


def _ours(method: Method) -> tuple[str, ...]:
    return (*MODEL_KEYS, "exclude", *method.keys)


def _problem(key: str, block: Block, known: set[str], method: Method) -> str:
    """Return what is wrong with a key that mergekit drops, or nothing."""
    word = key.lower().replace("-", "_")
    unknown = f"{block.where}: unknown key {key!r}."
    if not block.has_parameters:  # a tokenizer, a token, a model, a filter: nothing else is there
        near = nearest(word, known, cutoff=NEAR)
        return f"{unknown}{near} Known here: {', '.join(sorted(known))}."
    if key in _ours(method):
        place = _place(key, block, method)
        return f"{key!r} of {block.where} has no effect there; write it under {place}."
    if key in _KNOWN_SOMEWHERE:
        return f"{key!r} of {block.where} has no effect there; mergekit does not look at it."
    cutoff = NEARER if block.is_whole else NEAR
    own = f" A key of your own may begin with `{OWN}`." if block.is_whole else ""
    if near := nearest(word, known, cutoff=cutoff):
        return unknown + near + own
    if near := nearest(word, _ours(method), cutoff=cutoff):
        return f"{unknown}{near} Write that under `parameters:`.{own}"
    return ""


def _place(key: str, block: Block, method: Method) -> str:
    """Return under which `parameters` a key of ours belongs."""
    if block.is_model:
        return "`parameters:`" if key in MODEL_KEYS else "the recipe's own `parameters:`"
    if key == "sidecar":
        return "a model's own `parameters:`"
    everywhere = block.is_whole or key in (*method.shared_keys, *MODEL_KEYS)
    return "`parameters:`" if everywhere else "the recipe's own `parameters:`"
