"""An output tensor, and the tensors of the models' files that go into it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from mergekit.config import ConfigReader

from fisher_mergekit.errors import CheckpointError
from fisher_mergekit.merging import files as model_files
from fisher_mergekit.merging.exclude import is_excluded
from fisher_mergekit.merging.files import Files, ModelFiles, Stored
from fisher_mergekit.merging.walk import Record

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """One model's part in an output tensor.

    Attributes:
        weight: mergekit's description of the tensor in *this* model, whose layer may be another
            than the output's.
        stored: the tensor that the model's files give, or None if they lack it.
    """

    model: ModelReference
    weight: WeightInfo
    stored: Stored | None

    @property
    def tensor(self) -> Stored:
        """The tensor that the model's files give, where checks have seen that it is there."""
        assert self.stored is not None, f"{self.model} has no {self.weight.name}"
        return self.stored

    @property
    def is_made(self) -> bool:
        """Whether the files hold it in another layout than it is merged in."""
        group = self.stored.group if self.stored is not None else None
        return group is not None and not group.is_plain


@dataclass(frozen=True, eq=False)
class Slot:
    """One output tensor; equal to itself only.

    Attributes:
        weight: mergekit's description of it in the output.
        sources: in the recipe's order; only base_model's if the tensor is excluded.
        reader: the recipe's settings that hold there.
        excluded: not merged, but kept as base_model has it.
        aligned: of a table of tokens whose rows are brought in line, the models' parts that say
            which row is which token's: also of those that do not count, and base_model's.
    """

    weight: WeightInfo
    sources: tuple[Source, ...]
    reader: ConfigReader
    excluded: bool = False
    aligned: tuple[Source, ...] = ()

    @property
    def name(self) -> str:
        """The output tensor's name."""
        return str(self.weight.name)

    @property
    def is_floating(self) -> bool:
        """Whether it holds floating-point numbers, other than a buffer of integers."""
        return any(s.stored is not None and s.stored.is_floating for s in self.sources)

    @property
    def is_complete(self) -> bool:
        """Whether every model's files hold their part."""
        return all(source.stored is not None for source in self.sources)

    @property
    def is_merged(self) -> bool:
        """Whether it is an average: floating, and not excluded."""
        return self.is_floating and not self.excluded

    @property
    def shapes(self) -> str:
        """What shape it has in each model, for messages."""
        shapes = ", ".join(f"{list(s.tensor.shape)} in {s.model}" for s in self.sources)
        return f"{self.name} is {shapes}"

    def sizes(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return a shape without the axis of tokens, if rows are brought in line along it."""
        return without(shape, self.weight.vocabulary_axis if self.aligned else None)


def without(shape: Sequence[int], axis: int | None) -> tuple[int, ...]:
    """Return a shape without one of its axes."""
    return tuple(size for index, size in enumerate(shape) if index != axis)


def open_files(records: Iterable[Record]) -> tuple[Files, list[str]]:
    """Open the files of all models, base_model's too; return them and what is wrong with them."""
    models = {}
    for record in records:
        models.update(dict.fromkeys((*record.models, record.reader.base_model)))
    files: dict[ModelReference, ModelFiles] = {}
    problems = []
    for model in models:
        if model is None:
            continue
        try:
            files[model] = model_files.OPENED.anew(model)
        except CheckpointError as error:
            problems.append(f"{model}: {error.message}")
    return files, problems


def find_slots(
    records: Iterable[Record], files: Files, patterns: Sequence[str], *, aligns: bool = False
) -> list[Slot]:
    """Find what the models' files hold for each output tensor.

    Args:
        records: the output tensors.
        files: the models'.
        patterns: the recipe's `exclude`.
        aligns: whether tables of tokens are brought in line.

    As in mergekit, an optional tensor that no file holds is skipped. Models without readable files
    have no part in what is returned; `open_files` has told of them.
    """
    found = (_find_slot(record, files, patterns, aligns) for record in records)
    return [slot for slot in found if slot is not None]


def unwritten(records: Iterable[Record], made: Sequence[Slot], files: Files) -> list[str]:
    """Return the output tensors that are left out although a model has them itself.

    Such as a head that is excluded, and that base_model has tied.
    """
    names = {slot.name for slot in made}
    return [
        record.weight.name
        for record in records
        if record.weight.name not in names
        and any(
            model in files and files[model].holds(weight)
            for model, weight in zip(record.models, record.weights_in, strict=True)
        )
    ]


def by_model(sources: Iterable[Source]) -> dict[ModelReference, list[Source]]:
    """Return each model's sources."""
    found: dict[ModelReference, list[Source]] = {}
    for source in sources:
        found.setdefault(source.model, []).append(source)
    return found


def part_names(sources: Iterable[Source]) -> list[str]:
    """Return the tensors in a model's files of which its sources are made, each once."""
    return list(dict.fromkeys(part.name for source in sources for part in source.tensor.parts))


def _find_slot(record: Record, files: Files, patterns: Sequence[str], aligns: bool) -> Slot | None:
    weight, base = record.weight, record.reader.base_model
    sources = [
        Source(model, weight_in, files[model].find(weight_in))
        for model, weight_in in zip(record.models, record.weights_in, strict=True)
        if model in files
    ]
    of_base = [part for part in sources if part.model == base]
    if not of_base and base in files:
        # Where base_model is none of the inputs, the output's name finds its tensor.
        of_base = [Source(base, weight, files[base].find(weight))]
    excluded = is_excluded(weight.name, patterns)
    candidates = of_base if excluded else [*sources, *of_base]
    # mergekit also skips what it could have got by conversion, and writes a model without it.
    if weight.optional and not any(files[p.model].holds(p.weight) for p in candidates):
        LOG.info("Skipping optional weight %s", weight.name)
        return None
    present = [part for part in candidates if part.stored is not None]
    if weight.optional and present and not any(part.tensor.is_floating for part in present):
        # A buffer, and not every version of transformers writes it: who has it gives it.
        return Slot(weight, tuple(present), record.reader, excluded)
    own = tuple(of_base if excluded else sources)
    aligned: tuple[Source, ...] = ()
    if aligns and weight.vocabulary_axis is not None:
        aligned = _aligned(weight.vocabulary_axis, sources, of_base, record.adds_base, excluded)
    return Slot(weight, own, record.reader, excluded, aligned)


def _aligned(
    axis: int, sources: Sequence[Source], of_base: Sequence[Source], adds_base: bool, excluded: bool
) -> tuple[Source, ...]:
    """Return whose rows of tokens are looked at: as in mergekit, also an unlisted base_model's.

    Where an excluded tensor is base_model's, tokens that it lacks come from the other models, if
    theirs is of the same width.
    """
    more = of_base if adds_base or excluded else ()
    pool = [*sources, *(part for part in more if part not in sources)]
    found = [part for part in pool if part.stored is not None]
    if excluded:
        kept = {without(part.tensor.shape, axis) for part in of_base if part.stored is not None}
        found = [part for part in found if without(part.tensor.shape, axis) in kept]
    return tuple(found)
