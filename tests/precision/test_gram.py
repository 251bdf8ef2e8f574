"""The Gram solve against least squares on all rows, and its laws, for any rank of the inputs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisher_mergekit.precision import gram, identity

WIDTH, OUT = 7, 4


@st.composite
def problems(draw, least_rows=0):
    """Draw thetas, inputs and lambdas of one to three models; few rows, dead inputs, all sizes."""
    models = draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    thetas, inputs = [], []
    for _ in range(models):
        rows = torch.randn(draw(st.integers(least_rows, 20)), WIDTH, generator=generator).double()
        rows *= 10.0 ** torch.tensor(
            draw(st.lists(st.integers(-3, 3), min_size=WIDTH, max_size=WIDTH))
        )
        rows[:, draw(st.lists(st.integers(0, WIDTH - 1), max_size=2 if not least_rows else 0))] = 0
        inputs.append(rows)
        thetas.append(torch.randn(OUT, WIDTH, generator=generator).double())
    lambdas = draw(st.lists(st.floats(1e-2, 1e2), min_size=models, max_size=models))
    return thetas, inputs, lambdas


def grams(inputs):
    return [x.mT @ x for x in inputs]


@given(problems(least_rows=WIDTH + 3))
def test_it_is_least_squares_on_all_rows(problem):
    """min Σ λ ‖X Wᵀ − X Wᵢᵀ‖², its rows stacked and solved by QR."""
    thetas, inputs, lambdas = problem
    weighted = [x * lam**0.5 for x, lam in zip(inputs, lambdas, strict=True)]
    rows = torch.cat(weighted)
    wanted = torch.cat([x @ theta.mT for x, theta in zip(weighted, thetas, strict=True)])
    size = rows.norm(dim=0)  # columns of one size: the same solution, better conditioned
    expected = (torch.linalg.lstsq(rows / size, wanted).solution / size[:, None]).mT
    found = gram.solve(thetas, grams(inputs), lambdas, offdiagonal=1.0)
    seen = rows @ (found - expected).mT
    assert seen.norm() <= 1e-5 * wanted.norm().clamp_min(1e-30)


@given(problems(), st.floats(0, 0.99))
def test_it_solves_its_equation(problem, offdiagonal):
    thetas, inputs, lambdas = problem
    shrunk = [
        gram.shrunk(g, offdiagonal) * lam for g, lam in zip(grams(inputs), lambdas, strict=True)
    ]
    found = gram.solve(thetas, grams(inputs), lambdas, offdiagonal=offdiagonal)
    left = sum(shrunk) @ found.mT
    right = sum(g @ theta.mT for g, theta in zip(shrunk, thetas, strict=True))
    scale = sum(shrunk).diagonal().clamp_min(1e-300).sqrt()[:, None]
    assert ((left - right) / scale).norm() <= 1e-9 * (right / scale).norm().clamp_min(1e-30)


@given(problems(), st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.sampled_from([0.0, 1e-3]))
def test_laws(problem, offdiagonal, ridge):
    thetas, inputs, lambdas = problem
    options = {"offdiagonal": offdiagonal, "ridge": ridge}
    once = gram.solve(thetas, grams(inputs), lambdas, **options)

    def same(other, tolerance=1e-6):
        torch.testing.assert_close(other, once, rtol=tolerance, atol=tolerance)

    same(gram.solve(thetas, grams(inputs), [x * 1e30 for x in lambdas], **options))
    order = range(len(thetas))[::-1]
    backwards = ([x[i] for i in order] for x in (thetas, grams(inputs), lambdas))
    same(gram.solve(*backwards, **options))
    extra = torch.full((OUT, WIDTH), 9.0, dtype=torch.float64)
    same(gram.solve([*thetas, extra], [*grams(inputs), torch.eye(WIDTH)], [*lambdas, 0], **options))


@given(problems(), st.sampled_from([0.0, 0.9, 1.0]))
def test_equal_thetas_come_back_and_equal_grams_give_the_mean(problem, offdiagonal):
    thetas, inputs, lambdas = problem
    n = len(thetas)
    found = gram.solve([thetas[0]] * n, grams(inputs), lambdas, offdiagonal=offdiagonal)
    assert torch.equal(found, thetas[0])
    found = gram.solve(thetas, grams(inputs[:1] * n), lambdas, offdiagonal=offdiagonal)
    torch.testing.assert_close(found, identity.solve(thetas, lambdas), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("offdiagonal", [0.9, 1.0])
def test_in_directions_that_nobody_saw_the_mean_stays(offdiagonal):
    thetas = [torch.randn(OUT, WIDTH, generator=torch.manual_seed(n)).double() for n in (1, 2)]
    inputs = [torch.zeros(5, WIDTH, dtype=torch.float64) for _ in thetas]
    inputs[0][:, 0] = inputs[1][:, 1] = 3.0
    found = gram.solve(thetas, grams(inputs), [0.3, 0.7], offdiagonal=offdiagonal)
    torch.testing.assert_close(found[:, 0], thetas[0][:, 0])
    torch.testing.assert_close(found[:, 1], thetas[1][:, 1])
    mean = 0.3 * thetas[0] + 0.7 * thetas[1]
    torch.testing.assert_close(found[:, 2:], mean[:, 2:])


def test_one_factor_serves_layers_that_share_their_inputs():
    thetas = [torch.randn(2, OUT, WIDTH, generator=torch.manual_seed(n)) for n in (1, 2)]
    inputs = [torch.randn(2, 9, WIDTH, generator=torch.manual_seed(n)) for n in (3, 4)]
    factor = gram.factorize(grams(inputs), [1.0, 2.0])
    found = gram.solve(thetas, grams(inputs), [1.0, 2.0], factor=factor)
    alone = [
        gram.solve([x[e] for x in thetas], grams([x[e] for x in inputs]), [1.0, 2.0])
        for e in (0, 1)
    ]
    torch.testing.assert_close(found, torch.stack(alone))
