"""Σ_b (Σ_t rows_bto cols_bti)² in plain torch, for devices that like few large operations.

The way without Triton. On a CPU it is slower than blocks that stay in its cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

BUFFER_ELEMENTS = 2**26
"""Elements of the examples' gradients that are written down at a time: 256 MiB."""


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
    if rows_bot.is_cuda and rows_bot.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(rows_bot, cols_bti, out_dtype=torch.float32)
    return torch.bmm(rows_bot.float(), cols_bti.float())
