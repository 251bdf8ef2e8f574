"""A recipe as the measuring step reads it: all of it, mergekit's part and ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from mergekit.common import ModelReference
from mergekit.config import ConditionalParameter, MergeConfiguration
from pydantic import ValidationError

from fisher_mergekit.errors import PlanningError, RecipeError, nearest
from fisher_mergekit.methods import METHODS
from fisher_mergekit.recipe.blocks import Block, blocks
from fisher_mergekit.recipe.calibration import Calibration, Kind, read_calibration
from fisher_mergekit.recipe.dropped import NEAR, dropped_keys
from fisher_mergekit.recipe.mistakes import recipe_problems
from fisher_mergekit.recipe.parameters import shared_values, values_of
from fisher_mergekit.recipe.written import Written, read_text


@dataclass(frozen=True)
class RecipeModel:
    """One model of a recipe.

    Attributes:
        reference: what mergekit calls it.
        calibration: what it is measured on.
        sidecar: where to, if the recipe says.
        is_copied: whether it is merged with no other anywhere, and so needs no sidecar.
    """

    reference: ModelReference
    calibration: Calibration
    sidecar: Path | None
    is_copied: bool = False


@dataclass(frozen=True)
class Recipe:
    """A recipe that is ready to be measured."""

    kinds: tuple[str, ...]
    models: tuple[RecipeModel, ...]


def read_recipe(path: Path) -> Recipe:
    """Read a recipe for the measuring step.

    Raises:
        RecipeError: unreadable, not a mergekit recipe, a method that measures nothing, two ways of
            measuring one model, or an unknown key of `calibration`.
        PlanningError: keys that are unknown, misspelt or in the wrong place.
    """
    written = read_yaml(path)
    content = written.content
    config = parse_config(content, where=str(path))
    if config.merge_method not in METHODS:
        raise RecipeError(
            f"{path}: merge_method {config.merge_method!r} needs nothing measured."
            f"{nearest(config.merge_method, METHODS, cutoff=NEAR)} "
            f"Methods that do: {', '.join(METHODS)}."
        )
    problems = [*dropped_keys(config, written), *recipe_problems(config)]
    if problems:
        raise PlanningError([f"{path}: {problem}" for problem in problems])
    prior = _prior(config)
    models = [
        _model(reference, found, content.get("calibration"), prior, where=str(path))
        for reference, found in _by_model(config, content).items()
    ]
    if prior is not None and all(model.reference != prior for model in models):
        models.append(_unlisted(prior, config, content, where=str(path)))
    return Recipe(kinds_of(config), tuple(models))


def _by_model(
    config: MergeConfiguration, content: Mapping[str, Any]
) -> dict[ModelReference, list[Block]]:
    """Return a recipe's blocks of each model, under `models:` or in its slices and modules."""
    found: dict[ModelReference, list[Block]] = {}
    for block in blocks(config, content):
        if block.is_model:
            found.setdefault(measured_as(block.understood.model), []).append(block)
    return found


def _is_copy(block: Block) -> bool:
    """Whether a model is the only one in a slice or module, and nothing is a prior there."""
    around, *_ = block.within
    if around.is_whole:
        return False  # a recipe of one model is one to measure it by
    here = getattr(around.understood, "sources", None) or around.understood.models
    return len(here) == 1 and not _may_be_true([b.parameters.get("prior") for b in block.within])


def _may_be_true(settings: Sequence[Any]) -> bool:
    """Whether a parameter may hold, by its settings from the innermost block on."""
    for setting in settings:
        values = values_of(setting)
        if any(values):
            return True
        if not (setting is None or isinstance(setting, (list, ConditionalParameter))):
            return False  # filters let others through
    return False


def measured_as(model: ModelReference) -> ModelReference:
    """Return a model however its folder is spelt: two spellings merge its layers with each other.

    What is measured, once, is `./a`, if the recipe has `./a` and `./a/`.
    """
    path = model.model.path.rstrip("/")
    if model.lora is not None or not path or not Path(path).is_dir():
        return model
    return model.model_copy(update={"model": model.model.model_copy(update={"path": path})})


def _model(
    reference: ModelReference,
    found: Sequence[Block],
    defaults: Mapping[str, Any] | None,
    prior: ModelReference | None,
    *,
    where: str,
) -> RecipeModel:
    """Return one model, which may stand in several slices but is measured once."""
    entries = [block.written for block in found]
    said = {}
    for key in ("calibration", "sidecar"):
        values = [e if key == "calibration" else e.get("parameters") or {} for e in entries]
        given = [value[key] for value in values if value.get(key) is not None]
        if any(value != given[0] for value in given):
            raise RecipeError(
                f"{where}: {key} of {reference} is {given[0]!r} in one place, and "
                f"{next(v for v in given if v != given[0])!r} in another; a model is measured once."
            )
        said[key] = given[0] if given else None
    sidecar = said["sidecar"]
    if sidecar is not None and not (isinstance(sidecar, str) and sidecar):
        raise RecipeError(
            f"{where}: sidecar of {reference}: expected a folder or a .safetensors file, "
            f"got {sidecar!r}."
        )
    calibration = read_calibration(
        defaults, said["calibration"], where=f"{where}: calibration of {reference}"
    )
    is_copied = reference != prior and all(map(_is_copy, found))
    return RecipeModel(reference, calibration, Path(sidecar) if sidecar else None, is_copied)


def kinds_of(config: MergeConfiguration) -> tuple[str, ...]:
    """Return the kinds that a recipe's merge reads: its method's, and what `others` names."""
    own = METHODS[config.merge_method].kind
    named = shared_values(config, "others")
    return tuple(dict.fromkeys([own, *(word for word in named if word in get_args(Kind))]))


def _prior(config: MergeConfiguration) -> ModelReference | None:
    """Return base_model, if its Fisher is a prior of anything."""
    if config.base_model is None or not any(shared_values(config, "prior")):
        return None
    return measured_as(config.base_model)


def _unlisted(
    base: ModelReference, config: MergeConfiguration, content: Mapping[str, Any], *, where: str
) -> RecipeModel:
    """Return the base of a prior that is none of the models."""
    sidecar = (config.parameters or {}).get("prior_sidecar")
    calibration = read_calibration(content.get("calibration"), where=f"{where}: calibration")
    return RecipeModel(base, calibration, Path(sidecar) if isinstance(sidecar, str) else None)


def read_yaml(path: Path) -> Written:
    """Read a recipe's file.

    Raises:
        RecipeError: unreadable, several recipes, or something else than a recipe.
    """
    try:
        found = list(read_text(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror or error}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is not readable YAML: {error}") from None
    if len(found) > 1:
        raise RecipeError(
            f"{path} holds several recipes, as for mergekit-multi. Measure their models one by "
            "one: mergekit-fisher precompute --model MODEL --path DATA --text COLUMN"
        )
    if not found or not isinstance(found[0].content, dict):
        raise RecipeError(
            f"{path} is not a recipe: expected a mapping with merge_method and models."
        )
    return found[0]


def parse_config(content: Mapping[str, Any], *, where: str) -> MergeConfiguration:
    """Parse mergekit's part of a recipe.

    Raises:
        RecipeError: what mergekit says is wrong with it.
    """
    try:
        return MergeConfiguration.model_validate(content)
    except ValidationError as error:
        lines = dict.fromkeys(map(_complaint, error.errors()))
        raise RecipeError(f"{where} is not a mergekit recipe:\n  " + "\n  ".join(lines)) from None
    except RuntimeError as error:
        raise RecipeError(f"{where} is not a mergekit recipe: {error}.") from None


def _complaint(error: Any) -> str:
    """Return one line of what pydantic says; of a parameter it says it once a possible type."""
    place = error["loc"]
    if "parameters" not in place[:-1]:
        return f"{'.'.join(map(str, place))}: {error['msg']}"
    place = place[: place.index("parameters") + 2]
    return (
        f"{'.'.join(map(str, place))}: expected a number, a word, true or false, a list of them, "
        "or a list of filters with values"
    )
