"""`add_squares` against dense einsums: every mixture of uses of one parameter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fisher_mergekit.errors import MeasureError
from fisher_mergekit.measure import contributions
from fisher_mergekit.measure.contributions import Product, Scatter, Vector, add_squares


def dense(contribution: Product | Scatter | Vector, shape: tuple[int, ...]) -> Tensor:
    """Write the examples' gradients down, `[b, …]` float64."""
    if isinstance(contribution, Product):
        return torch.einsum("bto,bti->boi", contribution.rows.double(), contribution.cols.double())
    if isinstance(contribution, Scatter):
        one_hot = torch.nn.functional.one_hot(contribution.ids, shape[0]).double()
        return torch.einsum("btv,btd->bvd", one_hot, contribution.values.double())
    return contribution.values.double()


def check(uses: list, shape: tuple[int, ...]) -> None:
    start = torch.rand(shape)
    total = start.clone()
    add_squares(total, uses)
    expected = start.double() + sum(dense(u, shape) for u in uses).square().sum(0)
    torch.testing.assert_close(total.double(), expected, rtol=1e-4, atol=1e-5)


sizes = st.integers(1, 5)
kinds = st.lists(st.sampled_from(["product", "scatter"]), min_size=1, max_size=4)


@settings(max_examples=60)
@given(
    kinds=kinds,
    examples=sizes,
    lengths=st.lists(sizes, min_size=4, max_size=4),
    rows=st.integers(1, 11),
    width=sizes,
    block=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_uses_of_a_matrix_meet_before_the_square(
    kinds, examples, lengths, rows, width, block, dtype, seed
):
    """Products and scatters, each of another length, one token included, over block edges."""
    torch.manual_seed(seed)
    uses = []
    for kind, length in zip(kinds, lengths, strict=False):
        if kind == "product":
            matrices = torch.randn(examples, length, rows), torch.randn(examples, length, width)
            uses.append(Product(*(m.to(dtype) for m in matrices)))
        else:
            ids = torch.randint(rows, (examples, length))
            uses.append(Scatter(ids, torch.randn(examples, length, width).to(dtype)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contributions, "BLOCK_ELEMENTS", block)
        check(uses, (rows, width))


@settings(max_examples=20)
@given(
    examples=sizes,
    shape=st.lists(sizes, min_size=0, max_size=3).map(tuple),
    uses=st.integers(1, 3),
)
def test_uses_of_a_vector_meet_before_the_square(examples, shape, uses):
    check([Vector(torch.randn(examples, *shape)) for _ in range(uses)], shape)


@pytest.mark.parametrize("more", [-1, 0, 1, 300])
def test_blocks_cover_every_row_once(more):
    """A matrix of one block, and of a few rows more or fewer."""
    torch.manual_seed(0)
    height = contributions.BLOCK_ELEMENTS // 4096
    rows = height + more
    tied = [
        Product(torch.randn(2, 6, rows), torch.randn(2, 6, 4096)),
        Scatter(torch.tensor([[0, rows - 1, height - 2], [0, 0, 0]]), torch.randn(2, 3, 4096)),
    ]
    check(tied, (rows, 4096))
    check(tied[:1], (rows, 4096))


def test_a_token_that_occurs_twice_counts_as_one_gradient():
    total = torch.zeros(3, 1)
    add_squares(total, [Scatter(torch.tensor([[1, 1, 2]]), torch.tensor([[[1.0], [2.0], [4.0]]]))])
    assert total.tolist() == [[0.0], [9.0], [16.0]]


def test_the_same_token_in_two_examples_counts_as_two():
    total = torch.zeros(3, 1)
    add_squares(total, [Scatter(torch.tensor([[1], [1]]), torch.tensor([[[1.0]], [[2.0]]]))])
    assert total.tolist() == [[0.0], [5.0], [0.0]]


def test_a_sum_of_many_small_bfloat16_squares_does_not_stall():
    total = torch.zeros(1)
    for _ in range(600):
        add_squares(total, [Vector(torch.ones(1, 1, dtype=torch.bfloat16))])
    assert total.item() == 600


def test_a_parameter_cannot_be_a_matrix_and_a_vector():
    matrix = Product(torch.ones(1, 2, 3), torch.ones(1, 2, 4))
    with pytest.raises(MeasureError, match="both as a matrix and as a vector"):
        add_squares(torch.zeros(3, 4), [matrix, Vector(torch.ones(1, 3, 4))])
