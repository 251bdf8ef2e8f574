"""The keys under every `parameters` of a recipe: which there are, and what they say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mergekit.config import ConditionalParameter, MergeConfiguration

from fisher_mergekit.errors import nearest
from fisher_mergekit.methods import METHODS
from fisher_mergekit.recipe.blocks import Block, blocks

MODEL_KEYS = ("lambda", "weight", "sidecar")
"""Known keys under a model's `parameters`."""


def exclude_patterns(config: MergeConfiguration) -> tuple[tuple[str, ...], list[str]]:
    """Return the recipe's `exclude`, and what is wrong with it: anything but non-empty strings.

    Name parts, given as a list or as one string. Read from the raw settings, because to mergekit a
    list of strings is a layer gradient.
    """
    raw: Any = (config.parameters or {}).get("exclude")
    if raw is None:
        return (), []
    patterns = [raw] if isinstance(raw, str) else raw
    if not isinstance(patterns, list) or not all(isinstance(p, str) and p for p in patterns):
        return (), [
            f"parameters.exclude: expected a list of name parts such as [classifier], got {raw!r}."
        ]
    return tuple(patterns), []


def parameter_problems(config: MergeConfiguration) -> list[str]:
    """Return what is wrong with the keys under every `parameters` of a recipe of ours."""
    method = METHODS[config.merge_method]
    shared_keys = (*method.shared_keys, "lambda", "weight")
    # Tensors are excluded from the whole merge; there is no such thing as excluding from a slice.
    whole_keys = (*method.keys, "lambda", "weight", "exclude")
    problems: list[str] = []
    used: set[str] = set()
    for block in parameter_blocks(config):
        used |= {"lambda", "weight"} & block.parameters.keys()
        where = "parameters" if block.is_whole else f"parameters of {block.where}"
        known = MODEL_KEYS if block.is_model else whole_keys if block.is_whole else shared_keys
        for key in block.parameters:
            if key in known:
                continue
            if key in MODEL_KEYS:
                problems.append(f"{where}: {key!r} belongs under a model's own parameters.")
            elif key in whole_keys:
                problems.append(f"{where}: {key!r} belongs under the recipe's own parameters.")
            else:
                problems.append(
                    f"{where}: unknown parameter {key!r}.{nearest(key, known)} "
                    f"Known here: {', '.join(known)}."
                )
    if used == {"lambda", "weight"}:
        problems.append(
            "both `lambda` and `weight` are used; they are two names for one thing. Keep `lambda`."
        )
    return problems


def parameter_blocks(config: MergeConfiguration) -> Iterator[Block]:
    """Yield the blocks of the recipe that have `parameters`."""
    return (block for block in blocks(config) if block.parameters)


def shared_values(config: MergeConfiguration, key: str) -> list[Any]:
    """Return all values that a parameter has in a recipe, its modules and slices."""
    shared = (block.parameters for block in blocks(config) if not block.is_model)
    return [value for keys in shared for value in values_of(keys.get(key))]


def values_of(setting: Any) -> list[Any]:
    """Return all values that a setting has: its own, or those of its filters and gradients."""
    if isinstance(setting, list):
        return [value for part in setting for value in values_of(part)]
    if isinstance(setting, Mapping):
        return values_of(setting.get("value"))
    return values_of(setting.value) if isinstance(setting, ConditionalParameter) else [setting]
