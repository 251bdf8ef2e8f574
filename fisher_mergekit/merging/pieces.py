"""Tensors that transformers puts together while loading, merged in the layout of the files.

A statistic of single elements follows a conversion; a factor of a layer's inputs belongs to the
tensor in the files that it was measured for: one expert of a layer, one part of a fused
projection. So where all models' files are laid out alike, each of those is merged by itself, and
what is merged takes the way that transformers has for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from mergekit.architecture import WeightInfo

from fisher_mergekit.merging.files import Stored
from fisher_mergekit.merging.slots import Slot, Source
from fisher_mergekit.sidecar.checkpoint import TensorInfo

_NUMBER = re.compile(r"\d+")


def pieces_of(slot: Slot) -> tuple[Slot, ...]:
    """Return what an output tensor is put together from, or nothing.

    Nothing, if it is in the files as it is, or if the models' files hold it in different layouts.
    A piece is named after the output and the tensor in the first model's files.
    """
    if not slot.is_complete or not all(source.is_made for source in slot.sources):
        return ()
    first, *others = ([*map(_kind_of, source.tensor.parts)] for source in slot.sources)
    if any(other != first for other in others):
        return ()
    return tuple(
        Slot(
            WeightInfo(name=f"{slot.name} {part.name}", force_dtype=slot.weight.force_dtype),
            tuple(_piece(source, index) for source in slot.sources),
            slot.reader,
        )
        for index, part in enumerate(slot.sources[0].tensor.parts)
    )


def with_pieces(slots: Iterable[Slot]) -> dict[str, tuple[Slot, ...]]:
    """Return the pieces of each output tensor that has any, by its name."""
    # Rows of tokens are brought in line as they are in memory.
    found = ((slot.name, pieces_of(slot)) for slot in slots if not slot.aligned)
    return {name: pieces for name, pieces in found if pieces}


def _kind_of(part: TensorInfo) -> tuple[object, ...]:
    """Return in what a part must be like another model's, whose layer may be another one."""
    return _NUMBER.sub("N", part.name), part.shape


def _piece(source: Source, index: int) -> Source:
    part = source.tensor.parts[index]
    return Source(source.model, WeightInfo(name=part.name), Stored(part.name, part.shape, (part,)))
