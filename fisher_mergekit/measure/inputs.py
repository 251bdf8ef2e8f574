"""What a linear layer is given, and the second moments of it.

A row is what one token gives the layer. An embedding is a linear layer on one-hot rows; packed
experts are linear layers of which each gets the rows that are routed to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

PANEL = 192
"""Rows of a symmetric matrix that are summed at a time; what is left of them is not computed."""


@dataclass(frozen=True)
class Use:
    """How a call of a module uses a weight.

    Attributes:
        is_lookup: its rows are one-hot.
        axis: the weight's axis that the inputs run along, -1 or -2.
        offsets: of packed experts, where the rows of each begin, and the end.
    """

    is_lookup: bool = False
    axis: int = -1
    offsets: Sequence[int] | None = None


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a call of a module gives a weight.

    Attributes:
        x: rows `[…, i]`; `[n, i]` of packed experts, one expert after another; ids of a lookup.
        place: of packed experts `[n]`, which token each row is.
        tokens: of packed experts, how many tokens they got.
    """

    x: Tensor
    use: Use = Use()
    place: Tensor | None = None
    tokens: int | None = None

    @property
    def count(self) -> int:
        """How many tokens there are, padding included."""
        if self.tokens is not None:
            return self.tokens
        return self.x.numel() if self.use.is_lookup else self.x.shape[:-1].numel()

    def without(self, mask: Tensor) -> Inputs:
        """Return the inputs of the tokens that a mask `[tokens]` lets through, in `[n, i]`."""
        if self.use.offsets is None:
            flat = self.x.reshape(-1) if self.use.is_lookup else self.x.flatten(0, -2)
            return replace(self, x=flat[mask])
        assert self.place is not None
        kept = mask[self.place]
        before = [0, *kept.cumsum(0).tolist()]
        use = replace(self.use, offsets=[before[offset] for offset in self.use.offsets])
        return replace(self, x=self.x[kept], place=self.place[kept], use=use)


def add_moment(total: Tensor, rows: Tensor, use: Use, alpha: float = 1.0) -> None:
    """Add Σ x xᵀ to `total` in place: `[i, i]` (its upper triangle), or `[i]` its diagonal.

    Args:
        total: float32; with a leading axis of experts where `use` has offsets.
        rows: `[…, i]`, any floating dtype; ids where they are looked up.
        alpha: what is added is multiplied by it.
    """
    if use.is_lookup:
        counts = torch.bincount(rows.reshape(-1), minlength=len(total))
        total.add_(counts, alpha=alpha)
        return
    if use.offsets is None:
        _add_rows(total, rows.reshape(-1, rows.shape[-1]), alpha)
        return
    for of_expert, (start, stop) in zip(total, pairwise(use.offsets), strict=True):
        if start < stop:
            _add_rows(of_expert, rows[start:stop], alpha)


def _add_rows(total: Tensor, rows_ni: Tensor, alpha: float) -> None:
    rows_ni = rows_ni.float()
    if total.dim() == 1:
        total.add_(rows_ni.square().sum(0), alpha=alpha)
        return
    for start in range(0, len(total), PANEL):
        panel = rows_ni[:, start : start + PANEL]
        total[start : start + PANEL, start:].addmm_(panel.T, rows_ni[:, start:], alpha=alpha)


def fill_lower(total: Tensor) -> None:
    """Make `[…, i, i]` symmetric, in place, by its upper triangle."""
    for start in range(0, total.shape[-1], PANEL):
        stop = start + PANEL
        corner = total[..., start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).mT)
        total[..., stop:, start:stop] = total[..., start:stop, stop:].mT
