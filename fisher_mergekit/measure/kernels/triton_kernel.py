"""Σ_s (Σ_t rows_to cols_ti)² in one Triton kernel: a segment's product never leaves the chip.

A *segment* is a run of tokens whose gradient is squared whole: an example, or an example's tokens
that one expert saw. Consecutive segments form *groups* (experts), each with a matrix of its own.

One program holds one tile of one group's matrix. It walks over the group's tokens a *step* at a
time; where a segment ends, it squares the tile of its product and adds it to a second tile. Memory
is read as for the ordinary weight gradient, and the result is read and written once. All steps are
one loop, so the loads of the next segment overlap with the end of the last one: an example of 128
tokens is no more than a few steps.

A step is told by where it begins in `rows` and `cols` and how many tokens it has, so padded
batches, views of them, and sorted flat tokens are the same to the kernel.

Float32 tiles are multiplied as three TF32 products ("tf32x3"), which keeps float32's accuracy; half
precisions as they are, into float32 sums. A step has the same number of tokens whatever the tile's
size, and sums are in the order of tokens and segments.

This file is imported when a tensor is on a GPU, and not before.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def squares_kernel(
    total,
    rows,
    cols,
    row_starts,
    col_starts,
    counts,
    bounds,
    out,
    width,
    total_stride_e,
    total_stride_o,
    total_stride_i,
    row_stride_t,
    row_stride_o,
    col_stride_t,
    col_stride_i,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BAND: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Add the squares of one group's segments to one tile of its matrix.

    Args:
        total: float32 `[e, out, width]`.
        rows: `[…, t, out]`; step k begins at element `row_starts[k] * UNIT`.
        cols: `[…, t, width]`, likewise.
        row_starts: int64 `[k]`: a tensor can have more than 2³¹ elements.
        col_starts: int64 `[k]`.
        counts: int64 `[k]`, tokens of the step, 1 to `BLOCK_T`; negative where a segment ends.
        bounds: int64 `[e + 1]`; group e has the steps from `bounds[e]` to `bounds[e + 1]`.
        BAND: tiles are walked in bands of so many tile rows, whose inputs stay in the L2 cache.
        UNIT: 16 lets the compiler know that steps begin where wide loads may; else 1.
        PRECISION: how `tl.dot` multiplies.
        WIDEN: multiply as float32 what is not; Triton's interpreter has no bfloat16 product.
    """
    group = tl.program_id(1)
    first = tl.load(bounds + group)
    last = tl.load(bounds + group + 1)
    if first == last:
        return

    tile = tl.program_id(0)
    tiles_i = tl.cdiv(width, BLOCK_I)
    band = tile // (BAND * tiles_i)
    height = min(tl.cdiv(out, BLOCK_O) - band * BAND, BAND)
    within = tile % (BAND * tiles_i)
    start_o = (band * BAND + within % height).to(tl.int64) * BLOCK_O
    start_i = (within // height).to(tl.int64) * BLOCK_I

    # Offsets within a tile fit 32 bits; where a tile or a step begins may not.
    t = tl.arange(0, BLOCK_T)
    o = tl.arange(0, BLOCK_O)
    i = tl.arange(0, BLOCK_I)
    in_o = o < out - start_o
    in_i = i < width - start_i
    row_tile = rows + start_o * row_stride_o + t[:, None] * row_stride_t + o[None, :] * row_stride_o
    col_tile = cols + start_i * col_stride_i + t[:, None] * col_stride_t + i[None, :] * col_stride_i

    squares = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    product = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    count = tl.load(counts + first)
    row_start = tl.load(row_starts + first) * UNIT
    col_start = tl.load(col_starts + first) * UNIT
    for step in tl.range(first, last):
        in_t = t[:, None] < tl.abs(count)
        row = tl.load(row_tile + row_start, mask=in_t & in_o[None, :], other=0.0)
        col = tl.load(col_tile + col_start, mask=in_t & in_i[None, :], other=0.0)
        if WIDEN:
            row, col = row.to(tl.float32), col.to(tl.float32)
        product = tl.dot(row.T, col, product, input_precision=PRECISION)
        if count < 0:
            squares += product * product
            product = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
        # One step ahead, so that the tiles' addresses are known when their loads are issued.
        following = min(step + 1, last - 1)
        count = tl.load(counts + following)
        row_start = tl.load(row_starts + following) * UNIT
        col_start = tl.load(col_starts + following) * UNIT

    at = total + group.to(tl.int64) * total_stride_e
    at += start_o * total_stride_o + start_i * total_stride_i
    at += o[:, None] * total_stride_o + i[None, :] * total_stride_i
    inside = in_o[:, None] & in_i[None, :]
    tl.store(at, tl.load(at, mask=inside, other=0.0) + squares, mask=inside)
