"""Spans of tokens, cut into the steps that the kernel takes.

A segment is told by where its tokens begin, in elements of `rows` and `cols`, and by its length; so
padded examples, views of them, and sorted flat tokens are all the same. The tables are made on the
CPU, where lengths are known, and copied to the device in one piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)  # compared by identity: `cut` remembers them
class Spans:
    """Where the segments are: runs of tokens whose gradients are squared whole, in groups.

    Attributes:
        row_starts: int64 `[s]` on the CPU: the element of `rows` where segment s begins.
        col_starts: int64 `[s]`, likewise of `cols`.
        lengths: int64 `[s]`: tokens; a segment may be empty.
        bounds: int64 `[e + 1]`: group e has the segments from `bounds[e]` to `bounds[e + 1]`.
    """

    row_starts: Tensor
    col_starts: Tensor
    lengths: Tensor
    bounds: Tensor

    def mean_length(self) -> float:
        """Tokens of a segment that is not empty, on average."""
        return float(self.lengths.sum()) / max(1, int(self.lengths.count_nonzero()))

    def trial(self, count: int) -> Spans:
        """Return up to `count` segments that are not empty, as one group."""
        chosen = self.lengths.nonzero()[:count, 0]
        return Spans(
            self.row_starts[chosen],
            self.col_starts[chosen],
            self.lengths[chosen],
            torch.tensor([0, len(chosen)]),
        )


@dataclass(frozen=True)
class Steps:
    """The kernel's tables.

    Attributes:
        starts: int64 `[2, k]`: where each step begins in `rows` and `cols`, in units of `unit`.
        counts: int64 `[k]`: its tokens; negative where it ends a segment.
        bounds: int64 `[e + 1]`: group e has the steps from `bounds[e]` to `bounds[e + 1]`.
        unit: 16 where all steps begin at a multiple of 16 elements, else 1.
    """

    starts: Tensor
    counts: Tensor
    bounds: Tensor
    unit: int

    @property
    def groups(self) -> int:
        """How many matrices the steps add to."""
        return len(self.bounds) - 1

    def to(self, device: torch.device) -> Steps:
        """Return the tables on a device."""
        sizes = [2 * len(self.counts), len(self.counts), len(self.bounds)]
        packed = torch.cat([self.starts.flatten(), self.counts, self.bounds]).to(device)
        starts, counts, bounds = packed.split(sizes)
        return Steps(starts.view(2, -1), counts, bounds, self.unit)

    def split(self, parts: int) -> Steps:
        """Cut one group into up to `parts` of about as many steps each, whole segments in each."""
        assert self.groups == 1
        total = len(self.counts)
        ends = (self.counts < 0).nonzero()[:, 0] + 1
        wanted = torch.arange(1, parts) * total // parts
        cuts = ends[torch.searchsorted(ends, wanted)]
        edges = torch.cat([torch.tensor([0]), cuts, torch.tensor([total])])
        return Steps(self.starts, self.counts, edges.unique(), self.unit)


@lru_cache(maxsize=64)
def of_batch(
    lengths: tuple[int, ...], row_strides: tuple[int, ...], col_strides: tuple[int, ...]
) -> Spans:
    """One group, one segment an example `[b, t, ·]`; tokens beyond its length are not looked at."""
    number = torch.arange(len(lengths))
    return Spans(
        number * row_strides[0],
        number * col_strides[0],
        torch.tensor(lengths, dtype=torch.long),
        torch.tensor([0, len(lengths)]),
    )


def of_rows(offsets: Sequence[int], groups: int, row_stride: int, col_stride: int) -> Spans:
    """Rows after each other: segment s has those from `offsets[s]` to `offsets[s + 1]`.

    Every group has the same number of segments; strides are from row to row, in elements.
    """
    edges = torch.tensor(offsets, dtype=torch.long)
    starts, each = edges[:-1], (len(edges) - 1) // groups
    bounds = torch.arange(groups + 1) * each
    return Spans(starts * row_stride, starts * col_stride, edges.diff(), bounds)


@lru_cache(maxsize=64)
def cut(
    spans: Spans,
    size: int,
    row_stride: int,
    col_stride: int,
    parts: int,
    device: torch.device,
) -> Steps:
    """Cut segments into steps. Most layers of a model ask for the same ones: they are remembered.

    Args:
        spans: the segments to cut.
        size: tokens of a step, at most.
        row_stride: of `rows`, from token to token, in elements.
        col_stride: of `cols`.
        parts: if more than 1, split the one group that there is into up to so many.
        device: of the tables.
    """
    pieces = (spans.lengths + size - 1) // size
    ends = pieces.cumsum(0)
    segment = torch.arange(len(pieces)).repeat_interleave(pieces)
    # The tokens of its segment that come before a step.
    before = (torch.arange(len(segment)) - (ends - pieces)[segment]) * size
    counts = (spans.lengths[segment] - before).clamp(max=size)
    is_last = before + counts == spans.lengths[segment]
    starts = torch.stack(
        [
            spans.row_starts[segment] + before * row_stride,
            spans.col_starts[segment] + before * col_stride,
        ]
    )
    unit = 1 if (starts % 16).any() else 16
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), ends])[spans.bounds]
    steps = Steps(starts // unit, torch.where(is_last, -counts, counts), bounds, unit)
    return (steps.split(parts) if parts > 1 else steps).to(device)
