"""Kronecker factors on both sides: the iteration, its limits, and factors of any rank."""

import logging
from functools import partial

import dense_oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fisher_mergekit import precision
from fisher_mergekit.precision import equation, kfac
from fisher_mergekit.precision.iterative import refine
from fisher_mergekit.precision.kronecker import noise

solve = partial(precision.solve, offdiagonal=1.0)
"""With whole factors, which make the hard systems; `offdiagonal` is in test_laws.py."""

OUT, WIDTH = 6, 8


def factor(generator, width, rows, spread=2):
    """Return the float32 mean of x xᵀ over some rows, of numbers of different size."""
    x = torch.randn(rows, width, generator=generator)
    x *= 10.0 ** torch.randint(-spread, spread + 1, (width,), generator=generator)
    return x.mT @ x / rows


def problem(count, seed=0, rows=40, out=OUT, width=WIDTH):
    generator = torch.Generator().manual_seed(seed)
    thetas = list(torch.randn(count, out, width, generator=generator).double())
    precisions = [
        (factor(generator, width, rows), factor(generator, out, rows)) for _ in range(count)
    ]
    lambdas = (0.1 + torch.rand(count, generator=generator)).tolist()
    return thetas, precisions, lambdas


def lines(caplog, level):
    return [r.getMessage() for r in caplog.records if r.levelno == level]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_it_converges_to_the_dense_solution(count):
    thetas, precisions, lambdas = problem(count)
    matrices = [
        dense_oracle.kfac(theta.shape, precision, lam, offdiagonal=1.0)
        for theta, precision, lam in zip(thetas, precisions, lambdas, strict=True)
    ]
    expected = dense_oracle.solution(matrices, thetas)
    found = solve("kfac", thetas, precisions, lambdas, tolerance=1e-12)
    size = sum(matrices).diag().sqrt().view(expected.shape)
    assert ((found - expected) * size).norm() <= 1e-6 * (expected * size).norm()


@settings(max_examples=30)
@given(
    st.integers(1, 4),
    st.integers(0, 2**32),
    st.sampled_from(["matrix", "diagonal", "absent"]),
    st.integers(1, 20),
)
def test_where_the_outputs_factor_is_the_identity_it_is_gram(count, seed, form, rows):
    """For inputs of any rank, too."""
    thetas, precisions, lambdas = problem(count, seed, rows)
    grams = [(a,) for a, _ in precisions]
    expected = solve("gram", thetas, grams, lambdas, offdiagonal=1.0)
    eye = {"matrix": (torch.eye(OUT),), "diagonal": (torch.ones(OUT),), "absent": ()}[form]
    found = solve("kfac", thetas, [(*g, *eye) for g in grams], lambdas, tolerance=1e-12)
    seen = sum(a.double() * lam for (a,), lam in zip(grams, lambdas, strict=True))

    def norm(x):  # of what comes out for the inputs: directions that nobody saw are free
        return float((x @ seen * x).sum().clamp_min(0).sqrt())

    assert norm(found - expected) <= 1e-3 * max(map(norm, thetas))


@pytest.mark.parametrize("count", [1, 2])
def test_one_and_two_models_need_one_step(count, caplog):
    caplog.set_level(logging.INFO)
    thetas, precisions, lambdas = problem(count)
    system = kfac.system(precisions, lambdas)
    equation.solve(system, thetas, lambdas, name="layer.weight")
    (line,) = lines(caplog, logging.INFO)
    steps = 0 if count == 1 else 1  # one model is the mean, from which nothing differs
    assert line.startswith(f"layer.weight: solved in {steps} iterations to a residual of ")


def test_too_few_iterations_are_told_with_the_tensors_name(caplog):
    thetas, precisions, lambdas = problem(4)
    system = kfac.system(precisions, lambdas, tolerance=1e-10, iterations=2)
    equation.solve(system, thetas, lambdas, name="layer.weight")
    (line,) = lines(caplog, logging.WARNING)
    assert line.startswith("layer.weight: the solution has a residual of ")
    assert "after 2 iterations, not the tolerance of 1.0e-10. Allow more `iterations`" in line


@pytest.mark.parametrize("ended", [False, True])
def test_what_neither_coordinates_solve_is_told(ended, caplog):
    """All of S may be noise here, so refining stops; was the start any good?"""
    one, yes = torch.ones(2, 2).double(), torch.ones(1, 1, dtype=torch.bool)
    found = refine(
        lambda x: x, one, torch.zeros_like(one), which=yes, ended=yes & ended,
        precondition=lambda r: r, noise=2 * one, tolerance=1e-6, iterations=9, name="layer.weight",
    )  # fmt: skip
    assert not found.any()
    assert len(lines(caplog, logging.WARNING)) == (not ended)


def test_more_iterations_come_nearer():
    thetas, precisions, lambdas = problem(4)
    exact = solve("kfac", thetas, precisions, lambdas, tolerance=1e-13)
    gaps = []
    for iterations in (1, 5, 25):
        found = solve("kfac", thetas, precisions, lambdas, tolerance=0, iterations=iterations)
        gap = found - exact
        gaps.append(
            sum(
                lam * float((gap * (b.double() @ gap @ a.double())).sum())
                for (a, b), lam in zip(precisions, lambdas, strict=True)
            )
        )
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2]


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(("rows", "dtype"), [(4, torch.float32), (100, torch.bfloat16)])
def test_rounded_factors_of_few_rows_give_no_garbage(count, rows, dtype):
    """Far fewer rows than dimensions: what rounding makes up must not be taken for knowledge."""
    thetas, precisions, lambdas = problem(count, rows=rows, out=48, width=64)
    precisions = [(a.to(dtype), b.to(dtype)) for a, b in precisions]
    found = solve("kfac", thetas, precisions, lambdas, iterations=200)
    mean = equation.weighted_mean(thetas, lambdas)
    sizes = [
        sum(f[k].double().diag() / f[k].double().diag().mean() for f in precisions).sqrt()
        for k in (0, 1)
    ]
    size = sizes[1][:, None] * sizes[0]
    assert (found * size).norm() < 10 * max((theta * size).norm() for theta in thetas)

    def loss(merged):
        """How far all models are from what they did, as their factors measure it."""
        return sum(
            lam * float(((merged - t) * (b.double() @ (merged - t) @ a.double())).sum())
            for t, (a, b), lam in zip(thetas, precisions, lambdas, strict=True)
        )

    assert loss(found) < 0.2 * loss(mean)


def test_rounding_does_not_make_solutions_large():
    """Inputs and outputs that depend on one another, and models of different size."""
    generator = torch.Generator().manual_seed(0)
    out, width, rows = 24, 64, 20
    mix = torch.eye(width) + torch.randn(width, width, generator=generator) / 8
    mix *= torch.logspace(0, -2, width)[:, None]
    exact = []
    for size in (1.0, 1e4, 1e4):
        x = torch.randn(rows, width, generator=generator) @ mix
        g = torch.randn(rows, out, generator=generator)
        exact.append(tuple((size * z.mT @ z / rows).double() for z in (x.double(), g.double())))
    thetas = list(torch.randn(3, out, width, generator=generator))
    rounded = [tuple(f.float() for f in pair) for pair in exact]
    mean = equation.weighted_mean(thetas, [1.0] * 3)
    size = sum(b.diag() / b.trace() for _, b in exact).sqrt()[:, None]
    size = size * sum(a.diag() / a.trace() for a, _ in exact).sqrt()
    large, found = (
        ((solve("kfac", thetas, precisions, [1.0] * 3) - mean) * size).norm()
        for precisions in (exact, rounded)
    )
    assert found < 10 * large


def test_the_coarsest_factor_says_how_large_rounding_is():
    fine, coarse = torch.eye(WIDTH), torch.eye(WIDTH, dtype=torch.bfloat16)
    assert noise([fine, coarse]) == noise([coarse, fine]) == noise([coarse]) > noise([fine])


@pytest.mark.parametrize("seed", range(4))
def test_steps_into_what_rounding_made_up_are_taken_back(seed, caplog):
    """Several models of few rows: before a step shows it, others went that way in part."""
    thetas, precisions, lambdas = problem(4, seed, rows=3, out=10, width=12)
    precisions = [tuple(f / f.diag().mean() for f in pair) for pair in precisions]
    found = solve("kfac", thetas, precisions, lambdas)
    pairs = list(zip(thetas, precisions, lambdas, strict=True))

    def loss(merged):
        apart = [(merged - t, *precision, lam) for t, precision, lam in pairs]
        return sum(lam * float((d * (b.double() @ d @ a.double())).sum()) for d, a, b, lam in apart)

    # It can be brought to zero, and is negative only where rounding counts as knowledge.
    assert abs(loss(found)) < 1e-6 * loss(equation.weighted_mean(thetas, lambdas))
    of_inputs, of_outputs = (sum(f[k].double().diag() for f in precisions) for k in (0, 1))
    size = (of_outputs[:, None] * of_inputs).sqrt()
    assert (found * size).norm() < 20 * max((theta * size).norm() for theta in thetas)
    assert not lines(caplog, logging.WARNING)


def test_directions_that_nobody_saw_keep_the_mean():
    """Also those that only exist in pairs: inputs of one model with the outputs of another."""
    thetas = list(torch.randn(2, 4, 4, generator=torch.manual_seed(0)).double())
    first, second = torch.tensor([1.0, 1, 0, 0]), torch.tensor([0.0, 0, 1, 0])
    precisions = [(torch.diag(first), torch.diag(first)), (torch.diag(second), second)]
    found = solve("kfac", thetas, precisions, [1.0, 1.0])
    expected = (thetas[0] + thetas[1]) / 2
    expected[:2, :2] = thetas[0][:2, :2]
    expected[2, 2] = thetas[1][2, 2]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("seed", [5, 7, 15, 56])
def test_what_is_known_of_some_elements_only_is_not_lost(seed):
    """Sizes differ by many orders, in each model elsewhere: every element comes out right."""
    thetas, _, lambdas = problem(4, seed, out=5, width=6)
    generator = torch.Generator().manual_seed(seed)
    precisions = [
        (factor(generator, 6, 20, spread=3), factor(generator, 5, 20, spread=3)) for _ in range(4)
    ]
    matrices = [
        dense_oracle.kfac(theta.shape, pair, lam, offdiagonal=1.0)
        for theta, pair, lam in zip(thetas, precisions, lambdas, strict=True)
    ]
    expected = dense_oracle.solution(matrices, thetas)
    for order in ([0, 1, 2, 3], [2, 3, 0, 1]):
        given = [[x[i] for i in order] for x in (thetas, precisions, lambdas)]
        found = solve("kfac", *given, tolerance=1e-12)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("offdiagonal", [0.9, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_an_element_that_no_model_knows_keeps_the_mean(seed, offdiagonal):
    """An input is dead in two models, an output in the third; all others come out right."""
    thetas, precisions, lambdas = problem(3, seed)
    for of_model, side in enumerate((0, 0, 1)):
        precisions[of_model][side][0] = precisions[of_model][side][:, 0] = 0
    found = solve(
        "kfac", thetas, precisions, lambdas, offdiagonal=offdiagonal, tolerance=1e-12
    ).flatten()
    matrices = [
        dense_oracle.kfac(theta.shape, pair, lam, offdiagonal=offdiagonal)[1:, 1:]
        for theta, pair, lam in zip(thetas, precisions, lambdas, strict=True)
    ]
    expected = dense_oracle.solution(matrices, [theta.flatten()[1:] for theta in thetas])
    torch.testing.assert_close(found[1:], expected, rtol=1e-5, atol=1e-5)
    assert found[0] == pytest.approx(float(equation.weighted_mean(thetas, lambdas)[0, 0]))


def test_the_basis_of_shared_inputs_serves_every_layer():
    thetas, precisions, lambdas = problem(3)
    shared = kfac.common([a for a, _ in precisions], lambdas, offdiagonal=1.0)
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        own = [(a, factor(generator, OUT, 20)) for a, _ in precisions]
        system = kfac.system(own, lambdas, offdiagonal=1.0, shared=shared, tolerance=1e-12)
        found = equation.solve(system, thetas, lambdas)
        alone = solve("kfac", thetas, own, lambdas, tolerance=1e-12)
        torch.testing.assert_close(found, alone, rtol=1e-7, atol=1e-7)


def test_factors_that_are_no_covariances_give_numbers():
    """Damage that symmetry and a diagonal do not show."""
    odd = torch.tensor([[1.0, 9.0, 0.0], [9.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    thetas = list(torch.randn(3, 3, 3, generator=torch.manual_seed(0)))
    found = solve("kfac", thetas, [(odd, torch.eye(3)), (odd, odd), (torch.eye(3), odd)], [1, 2, 3])
    assert found.isfinite().all()
