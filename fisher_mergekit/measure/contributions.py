"""Per-example gradients of one parameter, squared before they are summed, and never written down.

The diagonal Fisher needs Σ_b (Σ_u c_bu)²: over examples b of one batch, the square of example b's
whole gradient, which is the sum over all uses u of the parameter. A layer hands in each use as a
*contribution*, a recipe for c_b that is cheaper than c_b itself:

| contribution | example b's gradient                | of                                   |
|--------------|-------------------------------------|--------------------------------------|
| `Product`    | Σ_t rows_bto cols_bti, `[out, in]`  | a matrix that multiplies tokens      |
| `Scatter`    | Σ_t values_btd at row ids_bt        | a matrix whose rows are looked up    |
| `Vector`     | values_b, any shape                 | all that is summed over tokens first |
| `Segments`   | Σ_n rows_no cols_ni over its rows   | packed experts, `[e, out, in]`       |

Axes: b examples, t tokens, o and i rows and columns of a matrix, v vocabulary, d features, e
experts, n rows of all experts after each other.
Sums are in float32: bfloat16 sums stall after 256 equal terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fisher_mergekit.errors import MeasureError
from fisher_mergekit.measure.kernels import add_squared_products, add_squared_segments
from fisher_mergekit.measure.kernels.lookups import add_meeting

BLOCK_ELEMENTS = 1024 * 1024
"""Elements of a block of the accumulator, 4 MiB. It and an equal buffer should stay in the last
cache; but a matrix product arranges all of `cols` anew for each block, so few blocks are fast."""


@dataclass(frozen=True)
class Product:
    """Σ_t rows_bto cols_bti: `rows` `[b, t, o]`, `cols` `[b, t, i]`."""

    rows: Tensor
    cols: Tensor


@dataclass(frozen=True)
class Scatter:
    """Values added at looked-up rows: `ids` `[b, t]`, `values` `[b, t, d]`."""

    ids: Tensor
    values: Tensor


@dataclass(frozen=True)
class Vector:
    """Gradients already summed over tokens: `values` `[b, *shape]`."""

    values: Tensor


@dataclass(frozen=True)
class Segments:
    """Products of neighbouring rows: `rows` `[n, o]`, `cols` `[n, i]`, one expert after another.

    Row n belongs to expert e and example b if offsets[e * b_all + b] <= n < offsets[… + 1].
    """

    rows: Tensor
    cols: Tensor
    offsets: Sequence[int]


Contribution = Product | Scatter | Vector | Segments


@torch.no_grad()
def add_squares(total: Tensor, contributions: Sequence[Contribution]) -> None:
    """Add Σ_b (Σ_u c_bu)² to `total`, in place.

    Args:
        total: float32 accumulator of the parameter's shape.
        contributions: all uses of the parameter in one batch.
    """
    first, *others = contributions
    if isinstance(first, Segments):
        if others:
            raise MeasureError("packed experts are used more than once in one pass.")
        if not add_squared_segments(total, first.rows, first.cols, first.offsets):
            _add_segments(total, first)
        return
    products = [c for c in contributions if isinstance(c, Product)]
    scatters = [c for c in contributions if isinstance(c, Scatter)]
    vectors = [c for c in contributions if isinstance(c, Vector)]
    if vectors and (products or scatters):
        raise MeasureError("one parameter is used both as a matrix and as a vector.")
    if vectors:
        gradient = sum((v.values.float() for v in vectors[1:]), vectors[0].values.float())
        total.add_(gradient.square().sum(0))
        return
    # Uses of a matrix are told apart by nothing but their tokens: join them there.
    scatter = _join_scatters(scatters) if scatters else None
    if not products:
        assert scatter is not None
        _add_scatter(total, scatter)
        return
    rows = _join([p.rows for p in products])
    cols = _join([p.cols for p in products])
    if rows.shape[1] == 1 and scatter is None:
        # One token: (rows_o cols_i)² = rows_o² cols_i², and the sum over examples is one product.
        total.addmm_(rows[:, 0].float().square().T, cols[:, 0].float().square())
    elif add_squared_products(total, rows, cols):
        if scatter is not None:
            add_meeting(total, rows, cols, scatter.ids, scatter.values)
    else:
        _add_products(total, rows.float(), cols.float(), scatter)


def _join_scatters(scatters: Sequence[Scatter]) -> Scatter:
    values = _join([s.values for s in scatters]).float()
    return Scatter(torch.cat([s.ids for s in scatters], dim=1), values)


def _join(parts: Sequence[Tensor]) -> Tensor:
    """Join along the tokens; one part alone, which can be `[b, t, v]`, is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def _add_scatter(total_vd: Tensor, scatter: Scatter) -> None:
    """O(b t d): sum each example's tokens of one id, square, add; never `[b, v, d]`."""
    vocabulary = total_vd.shape[0]
    examples = torch.arange(len(scatter.ids), device=scatter.ids.device)
    keys = (scatter.ids + vocabulary * examples[:, None]).reshape(-1)
    unique, inverse = torch.unique(keys, return_inverse=True)
    values = scatter.values.flatten(0, 1)
    sums = _add_rows(values.new_zeros(len(unique), values.shape[1]), inverse, values)
    _add_rows(total_vd, unique % vocabulary, sums.square_())


def _add_rows(total: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    """Add `values` `[n, d]` to the rows `ids` `[n]`, in a fixed order on every device."""
    if total.is_cuda:  # where index_add_ has none, as index_put_ has none on CPUs
        return total.index_put_((ids,), values, accumulate=True)
    return total.index_add_(0, ids, values)


def _add_products(
    total_oi: Tensor, rows_bto: Tensor, cols_bti: Tensor, scatter: Scatter | None
) -> None:
    """One product an example and block of rows; a block of `total_oi` stays in cache for all b."""
    out, width = total_oi.shape
    height = max(1, min(out, BLOCK_ELEMENTS // width))
    buffer = total_oi.new_empty(height, width)
    starts = range(0, out, height)
    lookup = None if scatter is None else _SortedRows(scatter, starts, out)
    for block, start in enumerate(starts):
        total = total_oi[start : start + height]
        gradient = buffer[: len(total)]
        rows_bot = rows_bto[:, :, start : start + height].mT
        for example, (rows_ot, cols_ti) in enumerate(zip(rows_bot, cols_bti, strict=True)):
            torch.mm(rows_ot, cols_ti, out=gradient)
            if lookup is not None:
                lookup.add_to(gradient, example, block, start)
            total.addcmul_(gradient, gradient)


class _SortedRows:
    """A scatter's values sorted by row within each example, so that a block finds its own."""

    def __init__(self, scatter: Scatter, starts: range, stop: int):
        self._ids, order = scatter.ids.sort(dim=1)
        self._values = torch.take_along_dim(scatter.values, order[:, :, None], dim=1)
        edges = torch.tensor([*starts, stop], device=scatter.ids.device, dtype=self._ids.dtype)
        edges = edges.expand(len(self._ids), -1).contiguous()
        self._edges = torch.searchsorted(self._ids, edges).tolist()

    def add_to(self, gradient: Tensor, example: int, block: int, start: int) -> None:
        low, high = self._edges[example][block : block + 2]
        if low < high:
            ids = self._ids[example, low:high] - start
            gradient.index_add_(0, ids, self._values[example, low:high])


def _add_segments(total_eoi: Tensor, segments: Segments) -> None:
    """One product a segment and block of rows; a block of an expert stays in cache for all b."""
    experts, out, width = total_eoi.shape
    examples = (len(segments.offsets) - 1) // experts
    height = max(1, min(out, BLOCK_ELEMENTS // width))
    buffer = total_eoi.new_empty(height, width)
    for expert in range(experts):
        edges = segments.offsets[expert * examples : (expert + 1) * examples + 1]
        spans = [slice(a, b) for a, b in pairwise(edges) if a < b]
        if not spans:
            continue
        everything = slice(edges[0], edges[-1])
        rows, cols = segments.rows[everything].float(), segments.cols[everything].float()
        spans = [slice(s.start - edges[0], s.stop - edges[0]) for s in spans]
        for start in range(0, out, height):
            total = total_eoi[expert, start : start + height]
            gradient = buffer[: len(total)]
            block = rows[:, start : start + height]
            for span in spans:
                torch.mm(block[span].T, cols[span], out=gradient)
                total.addcmul_(gradient, gradient)
