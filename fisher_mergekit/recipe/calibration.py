"""What a model is measured on, and how: the `calibration` of a recipe, and the command's flags."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fisher_mergekit.errors import RecipeError, nearest
from fisher_mergekit.methods import METHODS


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
    modules = iter_modules([str(Path(__file__).parents[1] / "measure" / folder)])
    return Literal[tuple(module.name for module in modules)]


if TYPE_CHECKING:
    Estimator = str
    Unit = str
    Kind = str
else:
    Estimator = _names("estimators")
    Unit = _names("units")
    Kind = Literal[tuple(sorted({method.kind for method in METHODS.values()}))]

Attention = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]
"""What transformers can compute attention with; which of them, depends on the model."""
Dtype = Literal["float32", "bfloat16", "float16"]
"""What can be computed in."""
SidecarDtype = Literal["float32", "bfloat16"]
"""What can be written; float16 has not the range of squares."""


class Calibration(BaseModel):
    """What a model is measured on, and how: the recipe's `calibration` block.

    `path`, `name`, `split`, `data_files` and `streaming` mean what they mean in
    `datasets.load_dataset`; a path that is a local .jsonl, .json, .csv, .tsv, .parquet or .txt file
    just works.
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
    dtype: Dtype = "float32"
    sidecar_dtype: SidecarDtype = "float32"


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


def home_problems(key: str, value: object) -> list[str]:
    """Refuse a path with a shell's short form of the home folder, which nobody lengthens here."""
    if not isinstance(value, str) or not value.startswith("~"):
        return []
    return [f"{key}: {value}: only a shell knows ~; write {os.path.expanduser(value)}."]


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
    for key in ("path", "optimizer"):
        for problem in home_problems(key, merged.get(key)):
            raise RecipeError(f"{where}: {problem}")
        if merged.get(key) == "":
            raise RecipeError(f"{where}: {key} is empty; leave it out, or name a file.")
    try:
        return Calibration.model_validate(merged)
    except ValidationError as error:
        lines = []
        for e in error.errors():
            key = str(e["loc"][0])
            wrong = _EXPECTED.get(key, e["msg"])
            lines.append(f"{key}: {wrong}, got {merged[key]!r}")
        raise RecipeError(f"{where}: " + "; ".join(dict.fromkeys(lines)) + ".") from None
