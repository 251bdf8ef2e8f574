"""Per-example squares of products in plain torch, for devices that like few large operations.

The way without Triton. On a CPU it is slower than blocks that stay in its cache.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fisher_mergekit.measure.kernels.steps import Spans

BUFFER_ELEMENTS = 2**26
"""Elements of the examples' gradients that are written down at a time: 256 MiB."""


_WIDENS = torch.version.cuda is not None and "dtype" in torch.ops.aten.bmm.overloads()
"""Whether this torch has products of half precisions with float32 results (2.8; not ROCm)."""


def add_squares_batched(
    total_oi: Tensor, rows_bto: Tensor, cols_bti: Tensor, elements: int = BUFFER_ELEMENTS
) -> None:
    """Add the squares to `total_oi`, in place: float32 sums, whatever the dtype of the inputs.

    Args:
        total_oi: float32 accumulator.
        rows_bto: zero where an example has no token.
        cols_bti: of the same dtype.
        elements: of the buffer.
    """
    out, width = total_oi.shape
    height = max(1, min(out, elements // width))
    examples = max(1, elements // (height * width))
    for start in range(0, out, height):
        total = total_oi[start : start + height]
        rows = rows_bto[:, :, start : start + height].mT
        for first in range(0, len(rows), examples):
            some = slice(first, first + examples)
            total += _products(rows[some], cols_bti[some]).square_().sum(0)


def _products(rows_bot: Tensor, cols_bti: Tensor) -> Tensor:
    """Return Σ_t, float32 `[b, o, i]`; a half precision is multiplied as it is where that works."""
    if _WIDENS and rows_bot.is_cuda and rows_bot.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(rows_bot, cols_bti, out_dtype=torch.float32)
    return torch.bmm(rows_bot.float(), cols_bti.float())


def add_squares_in_turn(
    total_eoi: Tensor,
    rows: Tensor,
    cols: Tensor,
    spans: Spans,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Add the squares of segments, one product each, multiplied in `dtype`.

    Args:
        total_eoi: float32 accumulator, a matrix a group.
        rows: `[…, t, o]`, any strides.
        cols: `[…, t, i]`.
        spans: where the segments are.
        dtype: float64 for something to compare with.
    """
    bounds, lengths = spans.bounds.tolist(), spans.lengths.tolist()
    starts = list(zip(spans.row_starts.tolist(), spans.col_starts.tolist(), strict=True))
    for total, (first, last) in zip(total_eoi, pairwise(bounds), strict=True):
        for segment in range(first, last):
            row_to, col_ti = (
                x.as_strided(
                    (lengths[segment], x.shape[-1]), x.stride()[-2:], x.storage_offset() + start
                ).to(dtype)
                for x, start in zip((rows, cols), starts[segment], strict=True)
            )
            if len(row_to):
                total += (row_to.T @ col_ti).square_().float()
