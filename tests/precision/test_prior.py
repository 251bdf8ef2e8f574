"""The base's own Fisher as a prior: its formula, and the merges that it has as limits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisher_mergekit.precision import prior, solve

SIZE = 6


@st.composite
def problems(draw):
    """Draw models and a base: thetas, Fishers (the base's are last), lambdas and scales."""
    count = draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    thetas = list(torch.randn(count + 1, SIZE, generator=generator))
    fishers = list((3 * torch.randn(count + 1, SIZE, generator=generator)).exp())
    lambdas = draw(st.lists(st.floats(0.01, 2), min_size=count, max_size=count))
    scales = draw(st.lists(st.floats(1e-12, 1e3), min_size=count + 1, max_size=count + 1))
    return thetas, [f * s for f, s in zip(fishers, scales, strict=True)], lambdas, scales


def merge(thetas, fishers, lambdas, scales, **options):
    return solve(
        "prior", thetas, [(f,) for f in fishers], prior.with_base(lambdas), scales=scales, **options
    )


def close(found, expected, tolerance=1e-4):
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


@given(problems(), st.sampled_from([0.0, 1e-6, 1e-2]), st.booleans())
def test_the_formula(problem, floor, normalize):
    thetas, fishers, lambdas, scales = problem
    common = (sum(s * s for s in scales) / len(scales)) ** 0.5
    *own, base = [
        f.double() / (s if normalize else common) for f, s in zip(fishers, scales, strict=True)
    ]
    base = base + floor
    *models, origin = (theta.double() for theta in thetas)
    total = base + sum(lam * f for lam, f in zip(lambdas, own, strict=True))
    moved = sum(
        lam * (base + f) * (theta - origin)
        for lam, f, theta in zip(lambdas, own, models, strict=True)
    )
    close(merge(*problem, floor=floor, normalize_fishers=normalize), origin + moved / total)


@given(problems())
def test_one_model_with_lambda_one_comes_back(problem):
    thetas, fishers, _, scales = problem
    found = merge(thetas[-2:], fishers[-2:], [1.0], scales[-2:])
    assert torch.equal(found, thetas[-2])


@given(problems())
def test_a_base_that_knows_nothing_gives_fisher(problem):
    thetas, fishers, lambdas, scales = problem
    found = merge(thetas, [*fishers[:-1], fishers[-1] * 0], lambdas, scales, floor=0.0)
    own = [(f,) for f in fishers[:-1]]
    close(found, solve("fisher", thetas[:-1], own, lambdas, scales=scales[:-1], floor=0.0))


@given(problems(), st.sampled_from([0.0, 1e-6]), st.booleans())
def test_models_that_know_nothing_give_task_arithmetic(problem, floor, base_knows):
    thetas, fishers, lambdas, scales = problem
    held = [f * 0 for f in fishers]
    if base_knows:
        held[-1] = fishers[-1]
    *models, base = thetas
    expected = base + sum(lam * (theta - base) for lam, theta in zip(lambdas, models, strict=True))
    close(merge(thetas, held, lambdas, scales, floor=floor), expected)


@given(problems())
def test_models_that_equal_the_base_leave_it(problem):
    thetas, *rest = problem
    same = [thetas[-1]] * len(thetas)
    assert torch.equal(merge(same, *rest), thetas[-1])


@given(problems(), st.randoms())
def test_order_changes_nothing_and_lambda_zero_removes(problem, random):
    thetas, fishers, lambdas, scales = problem
    order = list(range(len(lambdas)))
    random.shuffle(order)
    moved = ([x[i] for i in order] + x[-1:] for x in (thetas, fishers))
    shuffled = merge(*moved, [lambdas[i] for i in order], [*(scales[i] for i in order), scales[-1]])
    once = merge(*problem)
    close(shuffled, once)
    nan = torch.full((SIZE,), torch.nan)
    assert torch.equal(
        merge([nan, *thetas], [nan, *fishers], [0.0, *lambdas], [1.0, *scales]), once
    )


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30])
def test_fishers_of_any_size(size):
    generator = torch.manual_seed(0)
    thetas = list(torch.randn(3, SIZE, generator=generator))
    fishers = list(torch.randn(3, SIZE, generator=generator).exp())
    once = merge(thetas, fishers, [0.5, 0.9], [1.0] * 3)
    scaled = merge(thetas, [f * size for f in fishers], [0.5, 0.9], [size] * 3)
    close(scaled, once)
