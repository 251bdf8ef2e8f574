"""The keys under every `parameters` of a recipe: which there are, and what they say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mergekit.config import ConditionalParameter, MergeConfiguration

from fisher_mergekit.errors import nearest
from fisher_mergekit.methods import METHODS

MODEL_KEYS = ("lambda", "weight", "sidecar")
"""Known keys under a model's `parameters`."""

WHOLE = "parameters"
"""How messages call the recipe's own `parameters`, which hold for all models and slices."""


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
    for where, keys, is_model in parameter_blocks(config):
        used |= {"lambda", "weight"} & set(keys)
        is_whole = where == WHOLE
        known = MODEL_KEYS if is_model else whole_keys if is_whole else shared_keys
        for key in keys:
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


def parameter_blocks(
    config: MergeConfiguration,
) -> Iterator[tuple[str, Mapping[str, Any], bool]]:
    """Yield (where, settings, is it a model's) of every `parameters` in the recipe."""
    yield WHOLE, config.parameters or {}, False
    for model in config.models or ():
        yield f"parameters of {model.model}", model.parameters or {}, True
    modules = config.modules or {}
    for name, module in modules.items():
        yield f"parameters of module {name}", module.parameters or {}, False
        for model in module.models or ():
            yield f"parameters of {model.model} in {name}", model.parameters or {}, True
    slices = [*(config.slices or ()), *(s for m in modules.values() for s in m.slices or ())]
    for index, piece in enumerate(slices):
        yield f"parameters of slice {index}", piece.parameters or {}, False
        for source in piece.sources:
            yield f"parameters of {source.model} in slice {index}", source.parameters or {}, True


def shared_values(config: MergeConfiguration, key: str) -> list[Any]:
    """Return all values that a parameter has in a recipe, its modules and slices."""
    blocks = (keys for _, keys, is_model in parameter_blocks(config) if not is_model)
    return [value for keys in blocks for value in _values(keys.get(key))]


def _values(setting: Any) -> list[Any]:
    """Return all values that a setting has: its own, or those of its filters and gradients."""
    if isinstance(setting, list):
        return [value for part in setting for value in _values(part)]
    if isinstance(setting, Mapping):
        return _values(setting.get("value"))
    return _values(setting.value) if isinstance(setting, ConditionalParameter) else [setting]
