"""An output tensor, and the tensors of the models' files that go into it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from mergekit.architecture import WeightInfo
from mergekit.architecture.conversion import can_convert_checkpoint_keys
from mergekit.common import ModelReference
from mergekit.config import ConfigReader
from mergekit.io.tasks import LoaderCache

from fisher_mergekit.errors import CheckpointError
from fisher_mergekit.merging.exclude import is_excluded
from fisher_mergekit.sidecar.checkpoint import Checkpoint, TensorInfo

LOG = logging.getLogger(__name__)

Files: TypeAlias = Mapping[ModelReference, Checkpoint]
"""Each model's tensors, by the names in its files."""

_LAYER = re.compile(r"\.\d+(?=\.)")


@dataclass(frozen=True)
class Record:
    """One call of mergekit's `plan_tensor`: an output tensor, and what the models call it."""

    weight: WeightInfo
    weights_in: tuple[WeightInfo, ...]
    models: tuple[ModelReference, ...]
    reader: ConfigReader


@dataclass(frozen=True)
class Source:
    """One model's part in an output tensor.

    Attributes:
        weight: mergekit's description of the tensor in *this* model, whose layer may be another
            than the output's.
        info: the tensor in the model's files, or None if they lack it.
        converted: they lack it, but transformers would make it from others while loading.
    """

    model: ModelReference
    weight: WeightInfo
    info: TensorInfo | None
    converted: bool = False

    @property
    def tensor(self) -> TensorInfo:
        """The tensor in the model's files, where checks have seen that it is there."""
        assert self.info is not None, f"{self.model} has no {self.weight.name}"
        return self.info


@dataclass(frozen=True, eq=False)
class Slot:
    """One output tensor; equal to itself only.

    Attributes:
        weight: mergekit's description of it in the output.
        sources: in the recipe's order; only base_model's if the tensor is excluded.
        reader: the recipe's settings that hold there.
        excluded: not merged, but kept as base_model has it.
    """

    weight: WeightInfo
    sources: tuple[Source, ...]
    reader: ConfigReader
    excluded: bool = False

    @property
    def name(self) -> str:
        """The output tensor's name."""
        return str(self.weight.name)

    @property
    def is_floating(self) -> bool:
        """Whether it holds floating-point numbers, other than a buffer of integers."""
        return any(source.info is not None and source.info.is_floating for source in self.sources)

    @property
    def is_complete(self) -> bool:
        """Whether every model's files hold their part."""
        return all(source.info is not None for source in self.sources)

    @property
    def is_merged(self) -> bool:
        """Whether it is an average: floating, and not excluded."""
        return self.is_floating and not self.excluded


def open_files(records: Iterable[Record]) -> tuple[Files, list[str]]:
    """Open the files of all models, base_model's too; return them and what is wrong with them."""
    models = {}
    for record in records:
        models.update(dict.fromkeys((*record.models, record.reader.base_model)))
    files = {}
    problems = []
    for model in models:
        if model is None or model.lora is not None:  # the check of the recipe refuses LoRA
            continue
        try:
            files[model] = Checkpoint(LoaderCache().get(model).index.base_path)
        except CheckpointError as error:
            problems.append(f"{model}: {error.message}")
    return files, problems


def find_slots(
    records: Iterable[Record], files: Files, patterns: Sequence[str], trust_remote_code: bool
) -> list[Slot]:
    """Find what the models' files hold for each output tensor.

    As in mergekit, an optional tensor that no file holds is skipped. Models without readable files
    have no part in what is returned; `open_files` has told of them.
    """
    answers: dict[tuple[ModelReference, str], bool] = {}

    def is_converted(model: ModelReference, name: str) -> bool:
        # Slow, and layers are alike: asked only for the first layer that lacks the tensor.
        key = (model, _LAYER.sub(".N", name))
        if key not in answers:
            model_type = model.config(trust_remote_code=trust_remote_code).model_type
            answers[key] = can_convert_checkpoint_keys(model_type, set(files[model]), name)
        return answers[key]

    def source(model: ModelReference, weight: WeightInfo) -> Source:
        info = find(weight, files[model])
        return Source(model, weight, info, info is None and is_converted(model, weight.name))

    found = (_find_slot(record, files, patterns, source) for record in records)
    return [slot for slot in found if slot is not None]


def _find_slot(
    record: Record,
    files: Files,
    patterns: Sequence[str],
    source: Callable[[ModelReference, WeightInfo], Source],
) -> Slot | None:
    weight, base = record.weight, record.reader.base_model
    sources = [
        source(model, weight_in)
        for model, weight_in in zip(record.models, record.weights_in, strict=True)
        if model in files
    ]
    of_base = [part for part in sources if part.model == base]
    if not of_base and base in files:
        # Where base_model is none of the inputs, the output's name finds its tensor.
        of_base = [source(base, weight)]
    excluded = is_excluded(weight.name, patterns)
    candidates = of_base if excluded else [*sources, *of_base]
    held = any(is_held(part.weight, files[part.model]) for part in candidates)
    # mergekit also skips what it could have got by conversion, and writes a model without it.
    if weight.optional and not held and not any(part.converted for part in candidates):
        LOG.info("Skipping optional weight %s", weight.name)
        return None
    present = [part for part in candidates if part.info is not None]
    if weight.optional and present and not any(part.tensor.is_floating for part in present):
        # A buffer, and not every version of transformers writes it: who has it gives it.
        return Slot(weight, tuple(present), record.reader, excluded)
    return Slot(weight, tuple(of_base if excluded else sources), record.reader, excluded)


def find(weight: WeightInfo, files: Mapping[str, TensorInfo]) -> TensorInfo | None:
    """Return the tensor that mergekit would load for a weight, without reading it.

    A weight that the files do not hold itself may be tied to one that they do.
    """
    names = (*_own_names(weight), *(weight.tied_names or ()))
    return next((files[name] for name in names if name in files), None)


def is_held(weight: WeightInfo, files: Mapping[str, TensorInfo]) -> bool:
    """Whether a model's files hold the weight itself, not only one that it is tied to."""
    return any(name in files for name in _own_names(weight))


def _own_names(weight: WeightInfo) -> tuple[str, ...]:
    return (weight.name, *(weight.aliases or ()))
