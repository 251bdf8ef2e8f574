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
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fisher_mergekit.measure.kernels.batched import add_squares_batched

if TYPE_CHECKING:
    from fisher_mergekit.measure.kernels.steps import Segments

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
    if min(total_oi.shape) >= SMALLEST and _has_kernel(total_oi[None], rows, cols):
        from fisher_mergekit.measure.kernels import steps

        tokens = (rows.shape[1],) * len(rows) if lengths is None else tuple(lengths)
        segments = steps.of_batch(tokens, rows.stride()[:2], cols.stride()[:2])
        if _try_kernel(total_oi[None], rows, cols, lambda: segments):
            return True
    add_squares_batched(total_oi, rows, cols)
    return True


def add_squared_segments(
    total_eoi: Tensor, rows_no: Tensor, cols_ni: Tensor, offsets: Tensor, bounds: Tensor
) -> bool:
    """Add each expert's Σ_s (Σ_t rows_to cols_ti)² to its matrix, if the kernel can do it.

    Args:
        total_eoi: float32 accumulator, a matrix an expert; any strides.
        rows_no: tokens sorted by expert, then by example.
        cols_ni: likewise.
        offsets: `[s + 1]` integers: segment s, one example at one expert, has the tokens from
            `offsets[s]` to `offsets[s + 1]`. It may be empty.
        bounds: `[e + 1]` integers: expert e has the segments from `bounds[e]` to `bounds[e + 1]`.

    Returns:
        Whether it was done; if not, nothing was added.
    """
    rows, cols = _one_dtype(rows_no, cols_ni)
    if not _has_kernel(total_eoi, rows, cols):
        return False

    def segments() -> Segments:
        from fisher_mergekit.measure.kernels import steps

        return steps.of_tokens(rows, cols, offsets, bounds)

    return _try_kernel(total_eoi, rows, cols, segments)


def _has_kernel(total: Tensor, rows: Tensor, cols: Tensor) -> bool:
    """Return whether the kernel is written for such tensors, and has not failed before."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    # Offsets within a tile are 32 bits.
    is_near = all(stride < 2**23 for x in (total, rows, cols) for stride in x.stride()[-2:])
    return (
        not _broken
        and (total.is_cuda or is_interpreted())
        and find_spec("triton") is not None
        and total.dtype == torch.float32
        and rows.dtype in dtypes
        and is_near
    )


def _try_kernel(
    total: Tensor, rows: Tensor, cols: Tensor, segments: Callable[[], Segments]
) -> bool:
    """Run the kernel; if it cannot be run, nothing has been added, and it is never tried again."""
    try:
        from fisher_mergekit.measure.kernels import launch

        launch.add_squares(total, rows, cols, segments())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler or a driver may raise
        _broken.append(f"{type(error).__name__}: {error}")
        LOG.warning("The Triton kernel is not used, torch takes over: %s", _broken[0])
        return False
    return True


def is_interpreted() -> bool:
    """Return whether Triton runs kernels on the CPU, in Python, as tests do."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _one_dtype(rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
    """Bring both to the wider dtype, at most float32."""
    dtype = torch.promote_types(rows.dtype, cols.dtype)
    dtype = torch.float32 if dtype == torch.float64 else dtype
    return rows.to(dtype), cols.to(dtype)
