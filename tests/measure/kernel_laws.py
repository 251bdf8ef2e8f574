"""What the kernel computes, in Triton's interpreter: on the CPU, program by program.

`test_kernels.py` runs this file in a process of its own, with TRITON_INTERPRET=1: Triton looks at
it when it is imported, and nothing else may see it.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fisher_mergekit.measure import contributions, kernels
from fisher_mergekit.measure.contributions import Product, Scatter, Segments, add_squares
from fisher_mergekit.measure.kernels import launch, steps
from fisher_mergekit.measure.kernels.launch import Tile
from fisher_mergekit.measure.kernels.steps import Spans

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = Tile(16, 32, 1, 1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def dense(rows_bto: Tensor, cols_bti: Tensor) -> Tensor:
    """Write the examples' gradients down, square, sum: float64."""
    gradients = torch.einsum("bto,bti->boi", rows_bto.double(), cols_bti.double())
    return gradients.square().sum(0)


def by_segment(experts: int, rows: Tensor, cols: Tensor, offsets: list[int]) -> Tensor:
    """One expert and one segment after the other, float64."""
    squares = [
        (rows[start:stop].double().T @ cols[start:stop].double()).square()
        for start, stop in pairwise(offsets)
    ]
    return torch.stack(squares).unflatten(0, (experts, -1)).sum(1)


def assert_near(found: Tensor, expected: Tensor) -> None:
    """1e-5 relative, in the norm."""
    error = (found.double() - expected).norm() / expected.norm()
    assert error < 1e-5, error


def run_small(total: Tensor, rows: Tensor, cols: Tensor, segments: Spans, size: int) -> None:
    """Small tiles, so that small shapes have many of them."""
    cuts = steps.cut(segments, size, rows.stride(-2), cols.stride(-2), 1, rows.device)
    launch.launch(total, rows, cols, cuts, size, SMALL)


def batch_segments(rows: Tensor, cols: Tensor, lengths: tuple[int, ...]) -> Spans:
    return steps.of_batch(lengths, rows.stride()[:2], cols.stride()[:2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("examples", "tokens", "out", "width"),
    [
        (3, 32, 32, 64),  # whole tiles and steps
        (2, 33, 37, 50),  # one more token than two steps, ragged edges
        (1, 5, 1, 3),  # less than one tile
        (4, 1, 17, 33),  # one token
        (2, 16, 9 * 16, 40),  # more tile rows than a band
    ],
)
def test_tiles_and_steps_of_all_sorts(dtype, examples, tokens, out, width):
    rows = torch.randn(examples, tokens, out).to(dtype)
    cols = torch.randn(examples, tokens, width).to(dtype)
    start = torch.rand(out, width)
    total = start.clone()
    run_small(total[None], rows, cols, batch_segments(rows, cols, (tokens,) * examples), 16)
    assert_near(total, start.double() + dense(rows, cols))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_follows_an_example_is_not_looked_at(dtype):
    lengths = (40, 16, 0, 3)
    rows, cols = torch.randn(4, 40, 20), torch.randn(4, 40, 33)
    for example, length in enumerate(lengths):
        rows[example, length:] = cols[example, length:] = 0
    expected = dense(rows.to(dtype), cols.to(dtype))
    for example, length in enumerate(lengths):
        rows[example, length:] = cols[example, length:] = torch.nan
    rows, cols = rows.to(dtype), cols.to(dtype)
    total = torch.zeros(1, 20, 33)
    run_small(total, rows, cols, batch_segments(rows, cols, lengths), 16)
    assert_near(total[0], expected)


def test_views_are_not_copied():
    """Transposed, cut out, broadcast, and a result that is another's transpose (Conv1D)."""
    rows = torch.randn(3, 24, 30).mT[:, 1:22, :]  # [3, 21, 24], tokens innermost
    cols = torch.randn(1, 30, 100)[:, 9:, 7::3].expand(3, -1, -1)[:, :21]  # [3, 21, 31]
    assert not rows.is_contiguous()
    assert not cols.is_contiguous()
    total = torch.zeros(31, 24).mT
    run_small(total[None], rows, cols, batch_segments(rows, cols, (21,) * 3), 16)
    assert_near(total, dense(rows, cols))


@pytest.mark.parametrize("dtype", DTYPES)
def test_segments_of_experts(dtype):
    """Rows sorted by expert and example; experts and segments without rows."""
    offsets = [0, 0, 0, 3, 20, 20, 20, 21, 60]
    rows, cols = torch.randn(60, 21).to(dtype), torch.randn(60, 40).to(dtype)
    total = torch.zeros(4, 40, 21).mT
    run_small(total, rows, cols, steps.of_rows(offsets, 4, 21, 40), 16)
    assert_near(total, by_segment(4, rows, cols, offsets))
    assert not total[0].any()
    assert not total[2].any()


def test_dispatcher_tries_tiles_and_shares_examples_out(monkeypatch):
    """The whole way: trial of every tile, a result of few tiles shared among programs."""
    used = []
    monkeypatch.setattr(
        launch,
        "launch",
        lambda *arguments, launch=launch.launch: (used.append(arguments), launch(*arguments)),
    )
    rows, cols = torch.randn(5, 20, 66), torch.randn(5, 20, 70)
    lengths = (20, 13, 20, 7, 1)
    for example, length in enumerate(lengths):
        rows[example, length:] = 0
    start = torch.rand(66, 70)
    total = start.clone()
    assert kernels.add_squared_products(total, rows, cols, lengths)
    assert_near(total, start.double() + dense(rows, cols))
    assert {arguments[-1] for arguments in used[:-1]} == set(launch.TILES[torch.float32])
    assert used[-1][0].shape == (3, 66, 70)  # partial sums, of whole examples
    assert not kernels._broken
    # The next product of the kind is not tried again.
    used.clear()
    assert kernels.add_squared_products(total, rows, cols, lengths)
    assert len(used) == 1


def test_contributions_of_all_sorts_go_this_way(monkeypatch):
    """Uses of one matrix as it is multiplied by and looked up in, and packed experts."""
    rows, cols = torch.randn(3, 9, 70).bfloat16(), torch.randn(3, 9, 64).bfloat16()
    more_rows, more_cols = torch.randn(3, 2, 70), torch.randn(3, 2, 64)
    ids, values = torch.randint(5, (3, 4)), torch.randn(3, 4, 64)
    monkeypatch.setattr(contributions, "_add_products", None)
    total = torch.zeros(70, 64)
    uses = [Product(rows, cols), Product(more_rows, more_cols), Scatter(ids, values)]
    add_squares(total, uses)
    every_row = torch.cat([rows, more_rows, torch.nn.functional.one_hot(ids, 70)], 1)
    assert_near(total, dense(every_row, torch.cat([cols, more_cols, values], 1)))

    offsets = [0, 30, 31, 50, 50]
    monkeypatch.setattr(contributions, "_add_segments", None)
    rows, cols = torch.randn(50, 64).bfloat16(), torch.randn(50, 80)
    total = torch.zeros(2, 64, 80)
    add_squares(total, [Segments(rows, cols, offsets)])
    assert_near(total, by_segment(2, rows, cols, offsets))
    assert not kernels._broken


def test_nothing_to_add():
    total = torch.rand(2, 64, 64)
    start = total.clone()
    empty = torch.zeros(0, 64)
    assert kernels.add_squared_segments(total, empty, empty, [0, 0, 0])
    assert torch.equal(total, start)


def test_the_clock_does_not_decide_about_last_bits(monkeypatch):
    """The first tile is the slowest, and the others round otherwise: it is used all the same."""
    first, *others = launch.TILES[torch.float32]

    def rounds_otherwise(total, rows, cols, cuts, size, tile):
        total += kernels_squares
        if tile in others:
            total *= 1 + 1e-6

    clock = iter(range(100, 0, -1))
    monkeypatch.setattr(launch, "launch", rounds_otherwise)
    monkeypatch.setattr(launch, "_seconds", lambda *_: next(clock))
    monkeypatch.setattr(launch, "_fastest", {})
    rows, cols = torch.randn(1, 20, 64), torch.randn(1, 20, 64)
    kernels_squares = dense(rows, cols).float()
    launch.add_squares(torch.zeros(1, 64, 64), rows, cols, batch_segments(rows, cols, (20,)))
    assert list(launch._fastest.values()) == [first]


def test_a_wrong_kernel_is_found_out_and_torch_takes_over(monkeypatch, caplog):
    def wrong(total, *arguments, launch=launch.launch):
        launch(total, *arguments)
        total *= 1.001

    monkeypatch.setattr(launch, "launch", wrong)
    monkeypatch.setattr(launch, "_fastest", {})
    monkeypatch.setattr(kernels, "_broken", [])
    rows, cols = torch.randn(2, 20, 64), torch.randn(2, 20, 64)
    for _ in range(2):
        total = torch.zeros(64, 64)
        assert kernels.add_squared_products(total, rows, cols)
        assert_near(total, dense(rows, cols))
    (record,) = caplog.records
    assert "differs from torch by" in record.message


def test_a_compiler_that_fails_is_said_once_and_torch_takes_over(monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(launch, "launch", fail)
    monkeypatch.setattr(launch, "_fastest", {})
    monkeypatch.setattr(kernels, "_broken", [])
    rows, cols = torch.randn(2, 20, 64), torch.randn(2, 20, 64)
    total = torch.zeros(64, 64)
    for _ in range(2):
        assert kernels.add_squared_products(total, rows, cols)
    assert_near(total, 2 * dense(rows, cols))
    (record,) = caplog.records
    assert "Failed to find C compiler" in record.message
    assert kernels.add_squared_segments(total[None], rows[0], cols[0], [0, 20])
    assert_near(total, 2 * dense(rows, cols) + dense(rows[:1], cols[:1]))
