"""Which tokens the rows are that a layer is given: read off their number, and verified later.

A layer of texts gets a row a token, padding included; a layer of pictures gets none of it; and the
two can happen to be as many. What may tell is tried in order, on examples that are measured alone
too (`listening.py`). What tells the same of them need not of a later batch; that is found out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fisher_mergekit.measure.groups import ONCE, TokenReading, Unaligned
from fisher_mergekit.measure.inputs import Inputs


@dataclass(frozen=True)
class Masks:
    """Which tokens of a batch are no padding.

    Attributes:
        masks: `[b t]` for every input of tokens, by its name.
    """

    masks: Mapping[str, Tensor]

    def readings(self, inputs: Inputs, given: Tensor) -> list[tuple[TokenReading, ...]]:
        """Return all that may tell which tokens the rows are, the likeliest first.

        Those that say the same stand together.

        Args:
            given: what the layer was called with, before a row of all examples was repeated.
        """
        found: list[tuple[Tensor, list[TokenReading]]] = []
        for reading in (*self.masks, None):
            mask = self._mask(reading, inputs)
            if mask is None:
                continue
            same = next((alike for other, alike in found if torch.equal(other, mask)), None)
            if same is None:
                found.append((mask, [reading]))
            else:
                same.append(reading)
        is_repeated = inputs.use.offsets is None and len(given) < len(inputs.x)
        return [tuple(alike) for _, alike in found] + [(ONCE,)] * is_repeated

    def unpadded(self, inputs: Inputs, readings: tuple[TokenReading, ...]) -> Inputs | None:
        """Return the rows that are tokens; None if there are other rows than tokens.

        Args:
            readings: that said the same so far.

        Raises:
            Unaligned: they do not now.
        """
        first, *others = readings
        if first is ONCE:
            return replace(inputs, x=inputs.x[:1])
        mask = self._mask(first, inputs)
        for other in others:
            again = self._mask(other, inputs)
            is_same = mask is again is None if mask is None or again is None else mask.equal(again)
            if not is_same:
                raise Unaligned("which rows are padding is unclear", is_unclear=True)
        if mask is None:
            return None
        return inputs if first is None or mask.all() else inputs.without(mask)

    def _mask(self, reading: TokenReading, inputs: Inputs) -> Tensor | None:
        """Return which rows a reading lets through; None if it does not fit."""
        if reading is None:
            return torch.ones(inputs.count, dtype=torch.bool, device=inputs.x.device)
        mask = self.masks.get(reading)
        return mask if mask is not None and mask.numel() == inputs.count else None
