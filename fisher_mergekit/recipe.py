"""A mergekit recipe plus our keys, validated.

One file serves two commands. `mergekit-yaml` reads mergekit's part and ignores the rest; this
module reads all of it, and refuses what mergekit would drop in silence: unknown and misspelt keys.

    calibration (top level or per model)   what to measure on         -> `Calibration`
    parameters of a model                  lambda | weight, sidecar
    parameters (top level)                 the method's own, exclude
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import yaml
from mergekit.common import ModelReference
from mergekit.config import ConditionalParameter, MergeConfiguration
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fisher_mergekit.errors import PlanningError, RecipeError, nearest
from fisher_mergekit.methods import METHODS
from fisher_mergekit.misspelt import NEAR, misspelt

MODEL_KEYS = ("lambda", "weight", "sidecar")
"""Known keys under a model's `parameters`."""

WHOLE = "parameters"
"""How messages call the recipe's own `parameters`, which hold for all models and slices."""


def _no_boolean(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("Input should be a number")
    return value


Count = Annotated[int, BeforeValidator(_no_boolean), Field(gt=0)]
"""A positive number; pydantic alone would read `examples: true` as one example."""


def _names(folder: str) -> Any:
    """Return the type of a key whose values are the files of a folder of `measure/`.

    They are found without being imported: reading a recipe needs no PyTorch.
    """
    modules = iter_modules([str(Path(__file__).parent / "measure" / folder)])
    return Literal[tuple(module.name for module in modules)]


if TYPE_CHECKING:
    Estimator = str
    Unit = str
    Kind = str
else:
    Estimator = _names("estimators")
    Unit = _names("units")
    Kind = _names("kinds")

Attention = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]
"""What transformers can compute attention with; which of them, depends on the model."""


class Calibration(BaseModel):
    """What a model is measured on, and how: the recipe's `calibration` block.

    `path`, `name`, `split`, `data_files` and `streaming` mean what they mean in
    `datasets.load_dataset`; a path that is a local .jsonl, .csv or .parquet file just works.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str | None = None
    name: str | None = None
    split: str = "train"
    data_files: str | list[str] | dict[str, str | list[str]] | None = None
    streaming: bool = False
    text: str | tuple[str, str] | None = None
    messages: str | None = None
    image: str | None = None
    choices: str | tuple[str, ...] | None = None
    optimizer: str | None = None
    label: str | None = None
    estimator: Estimator | None = None
    unit: Unit = "sequence"
    examples: Count | None = None
    max_length: Count = 512
    mask_prompt: bool = False
    shuffle: bool = False
    seed: Annotated[int, BeforeValidator(_no_boolean), Field(ge=0)] = 0
    batch_size: Count | Literal["auto"] = "auto"
    gradient_checkpointing: bool = False
    attn_implementation: Attention | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    sidecar_dtype: Literal["float32", "bfloat16"] = "float32"


CALIBRATION_KEYS = tuple(Calibration.model_fields)
_SOURCES = ("text", "choices", "messages", "image")
"""Keys that say what the model reads, of which a model has its own or the recipe's, never both."""
_STATE_KEYS = ("optimizer", "sidecar_dtype")
"""Keys that count where an optimizer's state is read, and nothing is measured on data."""
_EXPECTED = {
    "batch_size": "Expected a number of examples above 0, or auto",
    "text": "Expected a column, or a pair [first, second]",
    "choices": "Expected a column of lists, or a list of columns",
}


@dataclass(frozen=True)
class RecipeModel:
    """One model of a recipe: its reference, its calibration, and its sidecar if the recipe says."""

    reference: ModelReference
    calibration: Calibration
    sidecar: Path | None


@dataclass(frozen=True)
class Recipe:
    """A recipe that is ready to be measured."""

    path: Path
    method: str
    kinds: tuple[str, ...]
    models: tuple[RecipeModel, ...]


def read_calibration(*layers: Mapping[str, Any] | None, where: str) -> Calibration:
    """Combine calibration blocks, later ones over earlier ones.

    Raises:
        RecipeError: an unknown key, or a value of the wrong type; `where` stands in the message.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        if layer is None:
            continue
        if not isinstance(layer, Mapping):
            raise RecipeError(f"{where}: expected a mapping of keys, got {layer!r}.")
        for key in layer:
            if key not in Calibration.model_fields:
                raise RecipeError(
                    f"{where}: unknown key {key!r}.{nearest(str(key), CALIBRATION_KEYS)} "
                    f"Known keys: {', '.join(CALIBRATION_KEYS)}."
                )
        if layer.get("optimizer") is not None:
            idle = [k for k, value in layer.items() if k not in _STATE_KEYS and value is not None]
            if idle:
                raise RecipeError(
                    f"{where}: {idle[0]!r} has no effect beside 'optimizer', whose state is read "
                    "as it is. Leave one of the two out."
                )
            # What the recipe says of all models is of those that are measured on data.
            merged = {key: value for key, value in merged.items() if key in _STATE_KEYS}
        elif layer.get("path") is not None:
            merged.pop("optimizer", None)
        if any(layer.get(key) is not None for key in _SOURCES):
            for key in _SOURCES:  # a chat of one model's own replaces the others' text
                merged.pop(key, None)
        merged |= layer
    try:
        return Calibration.model_validate(merged)
    except ValidationError as error:
        lines = []
        for e in error.errors():
            key = str(e["loc"][0])
            wrong = _EXPECTED.get(key, e["msg"])
            lines.append(f"{key}: {wrong}, got {merged[key]!r}")
        raise RecipeError(f"{where}: " + "; ".join(dict.fromkeys(lines)) + ".") from None


def read_recipe(path: Path) -> Recipe:
    """Read a recipe for the measuring step.

    Raises:
        RecipeError: unreadable, not a mergekit recipe, a method that measures nothing, two ways of
            measuring one model, or an unknown key of `calibration`.
        PlanningError: keys that are unknown, misspelt or in the wrong place.
    """
    content = _read_yaml(path)
    config = parse_config(content, where=str(path))
    if config.merge_method not in METHODS:
        raise RecipeError(
            f"{path}: merge_method {config.merge_method!r} needs nothing measured."
            f"{nearest(config.merge_method, METHODS, cutoff=NEAR)} "
            f"Methods that do: {', '.join(METHODS)}."
        )
    found = _entries(content)
    named = [(str(model), entry) for model, entries in found.items() for entry in entries]
    problems = [
        *misspelt(content, named),
        *_misplaced(content, named),
        *parameter_problems(config),
    ]
    if problems:
        raise PlanningError([f"{path}: {problem}" for problem in problems])
    models = [
        _model(reference, entries, content.get("calibration"), where=str(path))
        for reference, entries in found.items()
    ]
    if base := _prior(config, content, [model.reference for model in models], where=str(path)):
        models.append(base)
    return Recipe(path, config.merge_method, kinds_of(config), tuple(models))


def _entries(content: Mapping[str, Any]) -> dict[ModelReference, list[Mapping[str, Any]]]:
    """Return what a recipe says of each model, under `models:` or in its slices and modules."""
    found: dict[ModelReference, list[Mapping[str, Any]]] = {}
    for block in (content, *(content.get("modules") or {}).values()):
        pieces = [{"sources": block.get("models")}, *(block.get("slices") or ())]
        for entry in (entry for piece in pieces for entry in piece["sources"] or ()):
            found.setdefault(ModelReference.model_validate(entry["model"]), []).append(entry)
    return found


def _model(
    reference: ModelReference,
    entries: Sequence[Mapping[str, Any]],
    defaults: Mapping[str, Any] | None,
    *,
    where: str,
) -> RecipeModel:
    """Return one model, which may stand in several slices but is measured once."""
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
    return RecipeModel(reference, calibration, Path(sidecar) if sidecar else None)


def kinds_of(config: MergeConfiguration) -> tuple[str, ...]:
    """Return the kinds that a recipe's merge reads: its method's, and what `others` names."""
    own = METHODS[config.merge_method].kind
    named = _shared_values(config, "others")
    return tuple(dict.fromkeys([own, *(word for word in named if word in get_args(Kind))]))


def _prior(
    config: MergeConfiguration,
    content: Mapping[str, Any],
    listed: Sequence[ModelReference],
    *,
    where: str,
) -> RecipeModel | None:
    """Return base_model, if its Fisher is a prior and it is none of the models."""
    given = config.parameters or {}
    base, sidecar = config.base_model, given.get("prior_sidecar")
    if base is None or base in listed or not any(_shared_values(config, "prior")):
        return None
    calibration = read_calibration(content.get("calibration"), where=f"{where}: calibration")
    return RecipeModel(base, calibration, Path(sidecar) if isinstance(sidecar, str) else None)


def _shared_values(config: MergeConfiguration, key: str) -> list[Any]:
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


def _misplaced(
    content: Mapping[str, Any], entries: Sequence[tuple[str, Mapping[str, Any]]]
) -> list[str]:
    """Say which of our keys stand beside `parameters` and not under it: mergekit drops them."""
    keys = (*MODEL_KEYS, "exclude", *METHODS[content["merge_method"]].keys)
    return [
        f"{key!r} of {where} has no effect there; write it under `parameters:`."
        for where, block in [("the recipe", content), *entries]
        for key in keys
        if key in block
    ]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror or error}.") from None
    except yaml.composer.ComposerError:
        raise RecipeError(
            f"{path} holds several recipes, as for mergekit-multi. Measure their models one by "
            "one: mergekit-fisher precompute --model MODEL --path DATA --text COLUMN"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not readable YAML: {error}") from None
    if not isinstance(content, dict):
        raise RecipeError(
            f"{path} is not a recipe: expected a mapping with merge_method and models."
        )
    return content


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
