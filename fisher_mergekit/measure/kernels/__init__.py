"""Per-example squares of products on GPUs: a Triton kernel where there is one, else batched torch.

    triton_kernel.py   the kernel: segments of tokens, groups of segments
    launch.py          its tiles, which of them is the fastest, its launch (imports Triton)
    steps.py           the tables that tell it where segments are
    batched.py         the same in plain torch
    lookups.py         products that meet look-ups before the square

Nothing has to be switched on. Triton comes with torch's builds for GPUs. Where it is missing, torch
does it; where it cannot compile (it needs a C compiler), or computes something else than torch, the
log says so once and torch takes over.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from fisher_mergekit.measure.kernels.batched import add_squares_batched, add_squares_in_turn
from fisher_mergekit.measure.kernels.steps import Spans, of_batch, of_rows

LOG = logging.getLogger(__name__)

SMALLEST = 64
"""Rows and columns from which on the kernel pays: smaller results are little to write down."""

_broken: list[str] = []
"""Why the kernel is not used any more in this process."""


def add_squared_products(
    total_oi: Tensor, rows_bto: Tensor, cols_bti: Tensor, lengths: Sequence[int] | None = None
) -> bool:
    """Add Σ_b (Σ_t rows_bto cols_bti)² to `total_oi`, in place, if this is a GPU's work.

    Args:
        total_oi: float32 accumulator.
        rows_bto: any strides; zero beyond an example's length.
        cols_bti: any strides, on the same device.
        lengths: tokens of each example; those after them are skipped.

    Returns:
        Whether it was done. It is not on a CPU, where the caller knows better.
    """
    if not (total_oi.is_cuda or is_interpreted()):
        return False
    rows, cols = _one_dtype(rows_bto, cols_bti)
    tokens = (rows.shape[1],) * len(rows) if lengths is None else tuple(lengths)
    spans = of_batch(tokens, rows.stride()[:2], cols.stride()[:2])
    if not _try_kernel(total_oi[None], rows, cols, spans):
        add_squares_batched(total_oi, rows, cols)
    return True


def add_squared_segments(
    total_eoi: Tensor, rows_no: Tensor, cols_ni: Tensor, offsets: Sequence[int]
) -> bool:
    """Add each expert's Σ_b (Σ_n rows_no cols_ni)² to its matrix, in place, on a GPU.

    Args:
        total_eoi: float32 accumulator, a matrix an expert; any strides.
        rows_no: sorted by expert, then by example.
        cols_ni: likewise.
        offsets: expert e and example b of B have those from `offsets[e * B + b]` to the next.

    Returns:
        Whether it was done; as of `add_squared_products`.
    """
    if not (total_eoi.is_cuda or is_interpreted()):
        return False
    rows, cols = _one_dtype(rows_no, cols_ni)
    spans = of_rows(offsets, len(total_eoi), rows.stride(0), cols.stride(0))
    if not _try_kernel(total_eoi, rows, cols, spans):
        add_squares_in_turn(total_eoi, rows, cols, spans)
    return True


def _has_kernel(total: Tensor, rows: Tensor, cols: Tensor) -> bool:
    """Return whether the kernel is written for such tensors, and has not failed before."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    # Offsets within a tile are 32 bits.
    is_near = all(stride < 2**23 for x in (total, rows, cols) for stride in x.stride()[-2:])
    return (
        not _broken
        and min(total.shape[1:]) >= SMALLEST
        and _has_triton()
        and total.dtype == torch.float32
        and rows.dtype in dtypes
        and is_near
    )


def _try_kernel(total: Tensor, rows: Tensor, cols: Tensor, spans: Spans) -> bool:
    """Run the kernel; if it cannot be run, nothing has been added, and it is never tried again."""
    if not _has_kernel(total, rows, cols):
        return False
    try:
        from fisher_mergekit.measure.kernels import launch

        launch.add_squares(total, rows, cols, spans)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler or a driver may raise
        _broken.append(f"{type(error).__name__}: {error}")
        LOG.warning("The Triton kernel is not used, torch takes over: %s", _broken[0])
        return False
    return True


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def is_interpreted() -> bool:
    """Return whether Triton runs kernels on the CPU, in Python, as tests do."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _one_dtype(rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
    """Bring both to the wider dtype, at most float32."""
    dtype = torch.promote_types(rows.dtype, cols.dtype)
    dtype = torch.float32 if dtype == torch.float64 else dtype
    return rows.to(dtype), cols.to(dtype)
