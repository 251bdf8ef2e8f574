"""The Gram solve against least squares on all rows, and what holds of inputs of any rank."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisher_mergekit.precision import equation, gram, solve
from fisher_mergekit.precision.kronecker import times

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
    return [(x.mT @ x,) for x in inputs]


@given(problems(least_rows=WIDTH + 3))
def test_it_is_least_squares_on_all_rows(problem):
    """min Σ λ ‖X Wᵀ − X Wᵢᵀ‖², its rows stacked and solved by QR."""
    thetas, inputs, lambdas = problem
    weighted = [x * lam**0.5 for x, lam in zip(inputs, lambdas, strict=True)]
    rows = torch.cat(weighted)
    wanted = torch.cat([x @ theta.mT for x, theta in zip(weighted, thetas, strict=True)])
    size = rows.norm(dim=0)  # columns of one size: the same solution, better conditioned
    expected = (torch.linalg.lstsq(rows / size, wanted).solution / size[:, None]).mT
    found = solve("gram", thetas, grams(inputs), lambdas, offdiagonal=1.0)
    seen = rows @ (found - expected).mT
    assert seen.norm() <= 1e-5 * wanted.norm().clamp_min(1e-30)


@given(problems(), st.floats(0, 0.99))
def test_it_solves_its_equation_for_inputs_of_any_rank(problem, offdiagonal):
    thetas, inputs, lambdas = problem
    found = solve("gram", thetas, grams(inputs), lambdas, offdiagonal=offdiagonal)
    eye = torch.eye(WIDTH).double()
    shrunk = [
        times(a, eye, offdiagonal) * lam for (a,), lam in zip(grams(inputs), lambdas, strict=True)
    ]
    left = sum(shrunk) @ found.mT
    right = sum(a @ theta.mT for a, theta in zip(shrunk, thetas, strict=True))
    scale = sum(shrunk).diagonal().clamp_min(1e-300).sqrt()[:, None]
    assert ((left - right) / scale).norm() <= 1e-9 * (right / scale).norm().clamp_min(1e-30)


@given(problems(), st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.sampled_from([0.0, 1e-3]))
def test_laws_for_inputs_of_any_rank(problem, offdiagonal, ridge):
    thetas, inputs, lambdas = problem
    options = {"offdiagonal": offdiagonal, "ridge": ridge}
    once = solve("gram", thetas, grams(inputs), lambdas, **options)

    def same(other):
        torch.testing.assert_close(other, once, rtol=1e-6, atol=1e-6)

    assert once.isfinite().all()
    same(solve("gram", thetas, grams(inputs), [x * 1e30 for x in lambdas], **options))
    order = range(len(thetas))[::-1]
    backwards = ([x[i] for i in order] for x in (thetas, grams(inputs), lambdas))
    same(solve("gram", *backwards, **options))
    equal = solve("gram", thetas, grams(inputs[:1]) * len(thetas), lambdas, **options)
    if ridge == 0:
        # An eigenvalue of 1e-5 counts as seen, and magnifies the rounding of θᵢ − θ̄ by as much.
        mean = solve("identity", thetas, [()] * len(thetas), lambdas)
        torch.testing.assert_close(equal, mean, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("offdiagonal", [0.9, 1.0])
def test_in_directions_that_nobody_saw_the_mean_stays(offdiagonal):
    thetas = [torch.randn(OUT, WIDTH, generator=torch.manual_seed(n)).double() for n in (1, 2)]
    inputs = [torch.zeros(5, WIDTH, dtype=torch.float64) for _ in thetas]
    inputs[0][:, 0] = inputs[1][:, 1] = 3.0
    found = solve("gram", thetas, grams(inputs), [0.3, 0.7], offdiagonal=offdiagonal)
    torch.testing.assert_close(found[:, 0], thetas[0][:, 0])
    torch.testing.assert_close(found[:, 1], thetas[1][:, 1])
    mean = 0.3 * thetas[0] + 0.7 * thetas[1]
    torch.testing.assert_close(found[:, 2:], mean[:, 2:])


def test_of_inputs_that_go_together_the_rest_stays_the_mean():
    """Two models saw multiples of one vector: along it they decide, across it nobody does."""
    thetas = [torch.randn(OUT, WIDTH, generator=torch.manual_seed(n)).double() for n in (1, 2)]
    sizes = torch.ones(WIDTH, 1, dtype=torch.float64)
    along = sizes / sizes.norm()
    precisions = [(along @ along.mT,), (3 * along @ along.mT,)]
    found = solve("gram", thetas, precisions, [1.0, 1.0], offdiagonal=1.0)
    mean = (thetas[0] + thetas[1]) / 2
    across = torch.eye(WIDTH).double() - along @ along.mT
    torch.testing.assert_close(found @ across, mean @ across, rtol=1e-9, atol=1e-9)
    expected = (thetas[0] + 3 * thetas[1]) / 4 @ along
    torch.testing.assert_close(found @ along, expected, rtol=1e-9, atol=1e-9)


def test_a_ridge_pulls_to_the_mean():
    thetas = [torch.randn(OUT, WIDTH, generator=torch.manual_seed(n)).double() for n in (1, 2)]
    inputs = [torch.randn(20, WIDTH, generator=torch.manual_seed(n)).double() for n in (3, 4)]
    mean = (thetas[0] + thetas[1]) / 2
    gaps = [
        float((solve("gram", thetas, grams(inputs), [1, 1], ridge=ridge) - mean).norm())
        for ridge in (0, 0.1, 1, 10, 1e9)
    ]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-6
    (a,), (b,) = grams(inputs)
    total = a + b
    ridge = 0.5 * total.diag().mean() * torch.eye(WIDTH).double()
    right = a @ thetas[0].mT + b @ thetas[1].mT + ridge @ mean.mT
    expected = torch.linalg.solve(total + ridge, right).mT
    found = solve("gram", thetas, grams(inputs), [1, 1], ridge=0.5, offdiagonal=1.0)
    torch.testing.assert_close(found, expected)


def test_one_factorisation_serves_layers_that_share_their_inputs(monkeypatch):
    thetas = [[torch.randn(n, WIDTH, generator=torch.manual_seed(n + m)) for m in (0, 9)]
              for n in (OUT, 2, 3)]  # fmt: skip
    inputs = [torch.randn(9, WIDTH, generator=torch.manual_seed(n)) for n in (3, 4)]
    system = gram.system(grams(inputs), [1.0, 2.0])
    alone = [solve("gram", pair, grams(inputs), [1.0, 2.0]) for pair in thetas]
    for name in ("cholesky_ex", "eigh"):
        monkeypatch.setattr(torch.linalg, name, None)  # nothing is factorised any more
    for pair, expected in zip(thetas, alone, strict=True):
        torch.testing.assert_close(equation.solve(system, pair, [1.0, 2.0]), expected)


@pytest.mark.parametrize("height", [1, 3, OUT])
def test_large_layers_are_solved_some_rows_at_a_time(monkeypatch, height):
    """The head of a language model in float64 would be as large as all the rest."""
    thetas = [torch.randn(2, OUT, WIDTH, generator=torch.manual_seed(n)) for n in (1, 2)]
    inputs = [torch.randn(2, 9, WIDTH, generator=torch.manual_seed(n)) for n in (3, 4)]
    expected = solve("gram", thetas, grams(inputs), [1.0, 2.0])
    monkeypatch.setattr(gram, "ELEMENTS", height * 2 * WIDTH)
    found = solve("gram", thetas, grams(inputs), [1.0, 2.0])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("offdiagonal", [0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_grams_of_few_rows_stay_near_the_thetas(offdiagonal, dtype):
    """Fewer rows than dimensions: rounding must not be taken for what somebody saw."""
    generator = torch.Generator().manual_seed(0)
    width = 96
    thetas = list(torch.randn(2, 8, width, generator=generator))
    rows = torch.randn(2, 20, width, generator=generator)
    rows *= 10.0 ** torch.randint(-2, 3, (width,), generator=generator)
    rounded = [((x.mT @ x).to(dtype),) for x in rows]
    found = solve("gram", thetas, rounded, [1.0, 1.0], offdiagonal=offdiagonal)
    size = rows.square().sum((0, 1)).sqrt()  # as inputs see it: a tiny input's weight may be large
    assert (found * size).norm() < 3 * max((theta * size).norm() for theta in thetas)


def test_a_matrix_that_is_no_gram_gives_numbers():
    """Damage that symmetry and a diagonal do not show."""
    thetas = [torch.ones(2, 3), torch.zeros(2, 3)]
    odd = torch.tensor([[1.0, 9.0, 0.0], [9.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    for offdiagonal in (0.9, 1.0):
        found = solve("gram", thetas, [(odd,), (odd,)], [1, 2], offdiagonal=offdiagonal)
        assert found.isfinite().all()
