"""Which tile the kernel runs with, and the launch.

Which tile is the fastest is found by trying: once for each dtype, length class and device, on a
part of the first product that asks. A tile whose result differs from plain torch's is not used; nor
is one that rounds otherwise than the first that works, or the clock would decide about last bits.

This file imports Triton; only the dispatcher imports it, and only for tensors on a GPU.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fisher_mergekit.measure.kernels import is_interpreted
from fisher_mergekit.measure.kernels.batched import add_squares_in_turn
from fisher_mergekit.measure.kernels.steps import Spans, Steps, cut
from fisher_mergekit.measure.kernels.triton_kernel import squares_kernel

LOG = logging.getLogger(__name__)

BAND = 8
"""Tile rows that are walked together."""

TRIAL_SEGMENTS = 256
TRIAL_WIDTH = 4000
"""A trial is a product of at most so many spans, rows and columns; 4000 has ragged edges."""

TOLERANCE = 1e-4
"""Relative error of a trial above which a tile is wrong; rounding is near 1e-6."""


@dataclass(frozen=True)
class Tile:
    """What of the result one program holds, in two float32 copies.

    Attributes:
        out: its rows; a power of two, 16 or more, like `width`.
        width: its columns.
        warps: of 32 threads; 8 for the large tiles, or the two copies do not fit in registers.
        stages: how many steps are on their way at a time.
    """

    out: int
    width: int
    warps: int
    stages: int


TILES = {
    torch.bfloat16: (
        Tile(128, 128, 8, 3),
        Tile(128, 128, 8, 4),
        Tile(64, 128, 4, 3),
        Tile(128, 64, 4, 3),
        Tile(64, 64, 4, 4),
    ),
    torch.float32: (
        Tile(64, 64, 4, 3),
        Tile(64, 128, 8, 3),
        Tile(128, 64, 8, 3),
    ),
}
TILES[torch.float16] = TILES[torch.bfloat16]
"""Those that compile without spilling registers for compute capability 9.0."""

_fastest: dict[tuple[object, ...], Tile] = {}


class KernelError(Exception):
    """No tile compiles, runs, and gives what plain torch gives."""


def add_squares(total: Tensor, rows: Tensor, cols: Tensor, spans: Spans) -> None:
    """Add Σ_s (Σ_t rows_to cols_ti)² of each group's segments to its matrix, in place.

    Args:
        total: float32 `[e, out, width]`, any strides.
        rows: `[…, t, out]` of a dtype in `TILES`, any strides.
        cols: `[…, t, width]`, likewise.
        spans: the segments, in `e` groups.

    Raises:
        KernelError: no tile works here.
    """
    if not spans.lengths.any():
        return
    size = step_size(rows.dtype, spans.mean_length())
    tile = _fastest_tile(total, rows, cols, spans, size)
    parts = _parts(total, spans)
    steps = _steps(rows, cols, spans, size, parts)
    if steps.groups == len(total):
        launch(total, rows, cols, steps, size, tile)
        return
    # A matrix of few tiles: its examples are shared out among more programs. Partial sums in a
    # fixed order, unlike atomic additions, give the same bytes every time.
    shares = total.new_zeros(steps.groups, *total.shape[1:])
    launch(shares, rows, cols, steps, size, tile)
    total += shares.sum(0)


def step_size(dtype: torch.dtype, mean_length: float) -> int:
    """Return how many tokens a step has: of nothing but the dtype and the data."""
    largest = 32 if dtype == torch.float32 else 64
    return min(largest, max(16, 1 << (math.ceil(mean_length) - 1).bit_length()))


def launch(total: Tensor, rows: Tensor, cols: Tensor, steps: Steps, size: int, tile: Tile) -> None:
    """Run the kernel with one tile; arguments as of `add_squares`."""
    groups, out, width = total.shape
    tiles = math.ceil(out / tile.out) * math.ceil(width / tile.width)
    with torch.cuda.device_of(total):
        squares_kernel[(tiles, groups)](
            total,
            rows,
            cols,
            *steps.starts,
            steps.counts,
            steps.bounds,
            out,
            width,
            *total.stride(),
            *rows.stride()[-2:],
            *cols.stride()[-2:],
            BLOCK_O=tile.out,
            BLOCK_I=tile.width,
            BLOCK_T=size,
            BAND=BAND,
            UNIT=steps.unit,
            PRECISION="tf32x3" if rows.dtype == torch.float32 else "tf32",
            WIDEN=is_interpreted(),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


def _steps(rows: Tensor, cols: Tensor, spans: Spans, size: int, parts: int) -> Steps:
    return cut(spans, size, rows.stride(-2), cols.stride(-2), parts, rows.device)


def _parts(total: Tensor, spans: Spans) -> int:
    """Return among how many programs a tile's examples are shared: 1 if the device is full."""
    groups, out, width = total.shape
    processors = 4 if is_interpreted() else _processors(total.device)
    tiles = math.ceil(out / 128) * math.ceil(width / 128)
    if groups > 1 or tiles >= processors:
        return 1
    return min(len(spans.lengths), math.ceil(2 * processors / tiles))


def _processors(device: torch.device) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def _fastest_tile(total: Tensor, rows: Tensor, cols: Tensor, spans: Spans, size: int) -> Tile:
    length = spans.mean_length()
    key = (
        rows.device,
        rows.dtype,
        size,
        min(3, round(length / size)),
        # A large dimension is worth another tile than a small one.
        *(min(4, dimension // 256) for dimension in total.shape[1:]),
        # Where the loads are wide.
        *(x.stride(-1) == 1 for x in (total, rows, cols)),
    )
    if key not in _fastest:
        _fastest[key] = _try_tiles(total, rows, cols, spans, size)
    return _fastest[key]


def _try_tiles(total: Tensor, rows: Tensor, cols: Tensor, spans: Spans, size: int) -> Tile:
    """Time all tiles on a part of the product; check each against plain torch."""
    spans = spans.trial(TRIAL_SEGMENTS)
    rows, cols = rows[..., :TRIAL_WIDTH], cols[..., :TRIAL_WIDTH]
    steps = _steps(rows, cols, spans, size, parts=1)
    trial = torch.zeros(1, rows.shape[-1], cols.shape[-1], device=total.device)
    corner = trial[:, -128:, -128:]
    expected = torch.zeros_like(corner)
    add_squares_in_turn(expected, rows[..., -128:], cols[..., -128:], spans, torch.float64)

    times: dict[Tile, float] = {}
    reference: Tensor | None = None
    failures: list[str] = []
    for tile in TILES[rows.dtype]:
        try:
            trial.zero_()
            launch(trial, rows, cols, steps, size, tile)
            difference, norm = ((x.double().norm()) for x in (corner - expected, expected))
            if not difference <= TOLERANCE * norm:
                raise KernelError(f"it differs from torch by {difference / norm:.1e}")
            reference = corner.clone() if reference is None else reference
            if not torch.equal(corner, reference):
                raise KernelError("it rounds otherwise than the first tile that works")
            run = partial(launch, trial, rows, cols, steps, size, tile)
            times[tile] = _seconds(run, total.device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler or a driver may raise
            failures.append(f"{type(error).__name__}: {error}")
    if not times:
        raise KernelError("no tile works here: " + "; ".join(dict.fromkeys(failures)))
    if failures:
        LOG.debug("Tiles that do not work here: %s", "; ".join(failures))
    best = min(times, key=lambda tile: times[tile])
    LOG.debug("%s of %s: %s", rows.dtype, list(total.shape), best)
    return best


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    """Return the median time of a few runs."""
    times = []
    for _ in range(1 if is_interpreted() else 5):
        _synchronize(device)
        start = time.perf_counter()
        run()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
