"""Laws of the diagonal precisions, for any numbers that a merge can meet."""

import math

import merge_oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fisher_mergekit.precision import diagonal, equation, kind_for, solve
from fisher_mergekit.precision.diagonal import relative

SIZE = 5
COUNT = st.shared(st.integers(1, 4), key="models")

# Weights, or exact zeros; not what lies at the edge of float32, where products lose their digits.
finite = st.floats(-1e4, 1e4, width=32).map(lambda x: x if abs(x) >= 2**-40 else 0.0)
scales = st.floats(1e-18, 1e3)
# Fishers as they come: many orders of magnitude, and exact zeros.
fisher_values = st.one_of(st.just(0.0), st.floats(2**-60, 2**20, width=32))


def merge_fisher(thetas, fishers, lambdas, scales, **options):
    return solve("fisher", thetas, [(f,) for f in fishers], lambdas, scales=scales, **options)


def isotropic(thetas, lambdas):
    return solve("identity", thetas, [()] * len(thetas), lambdas)


def lists(values, count=SIZE):
    return st.lists(values, min_size=count, max_size=count)


def per_model(values):
    return COUNT.flatmap(lambda n: lists(values, n))


@st.composite
def problems(draw):
    """Draw thetas, Fishers, positive lambdas and scales of one to four models."""
    thetas = [torch.tensor(x) for x in draw(per_model(lists(finite)))]
    fishers = [torch.tensor(x) for x in draw(per_model(lists(fisher_values)))]
    lambdas = draw(per_model(st.floats(1e-3, 1e3)))
    sizes = draw(per_model(scales))
    return thetas, fishers, lambdas, sizes


def close(found, expected, thetas):
    """Compare relative to the largest input: differences of thetas cancel no better than that."""
    largest = max(float(theta.abs().max()) for theta in thetas)
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-5 * largest)


@given(problems(), st.floats(1e-9, 1e-1))
def test_definition(problem, floor):
    thetas, fishers, lambdas, sizes = problem
    expected = merge_oracle.merge_tensor(thetas, fishers, lambdas, sizes, floor=floor)
    close(merge_fisher(*problem, floor=floor), expected, thetas)


@given(problems(), st.floats(1e-9, 1e-1), st.data())
def test_definition_with_a_favored_model(problem, floor, data):
    thetas, fishers, lambdas, sizes = problem
    favor = data.draw(st.integers(0, len(thetas) - 1))
    expected = merge_oracle.merge_tensor(thetas, fishers, lambdas, sizes, floor=floor, favor=favor)
    close(merge_fisher(*problem, floor=floor, favor=favor), expected, thetas)


@given(problems(), st.floats(0, 1))
def test_result_lies_between_the_inputs(problem, floor):
    thetas = torch.stack(problem[0])
    slack = 1e-5 * float(thetas.abs().max())
    merged = merge_fisher(*problem, floor=floor)
    assert bool((merged >= thetas.amin(0) - slack).all())
    assert bool((merged <= thetas.amax(0) + slack).all())


@given(problems(), st.floats(0, 1))
def test_equal_thetas_come_back_unchanged(problem, floor):
    thetas, *rest = problem
    same = [thetas[0]] * len(thetas)
    assert torch.equal(merge_fisher(same, *rest, floor=floor), thetas[0])
    assert torch.equal(isotropic(same, rest[1]), thetas[0])


@given(problems(), st.floats(0, 1))
def test_equal_precisions_give_the_isotropic_merge(problem, floor):
    thetas, fishers, lambdas, sizes = problem
    n = len(thetas)
    merged = merge_fisher(thetas, [fishers[0]] * n, lambdas, [sizes[0]] * n, floor=floor)
    close(merged, isotropic(thetas, lambdas), thetas)


@given(problems(), st.sampled_from([0.0, 1e-6, 1e-2]), st.floats(1e-200, 1e200))
def test_scaling_all_lambdas_changes_nothing(problem, floor, factor):
    thetas, fishers, lambdas, sizes = problem
    scaled = [value * factor for value in lambdas]
    once = merge_fisher(thetas, fishers, lambdas, sizes, floor=floor)
    close(merge_fisher(thetas, fishers, scaled, sizes, floor=floor), once, thetas)
    close(isotropic(thetas, scaled), isotropic(thetas, lambdas), thetas)


@given(problems(), st.floats(1e-6, 1e6))
def test_scaling_a_fisher_with_its_scale_changes_nothing(problem, factor):
    thetas, fishers, lambdas, sizes = problem
    scaled = [fishers[0].mul(factor), *fishers[1:]]
    once = merge_fisher(*problem)
    close(
        merge_fisher(thetas, scaled, lambdas, [sizes[0] * factor, *sizes[1:]]),
        once,
        thetas,
    )


LARGE = st.floats(1.0, 2.0, width=32)


@given(
    per_model(lists(finite)),
    per_model(lists(st.one_of(st.just(0.0), LARGE))),
    st.integers(-120, 125),
    st.sampled_from([0.0, 1e-6]),
    st.booleans(),
)
def test_a_fisher_may_be_as_small_or_large_as_float32_holds(
    thetas, fishers, power, floor, normalize
):
    """Bit by bit: powers of two are exact. Large language models have Fishers of 1e-18."""
    thetas = [torch.tensor(theta) for theta in thetas]
    fishers = [torch.tensor(values) for values in fishers]
    ones = [1.0] * len(thetas)
    options = {"floor": floor, "normalize_fishers": normalize}
    factor = 2.0**power
    expected = merge_fisher(thetas, fishers, ones, ones, **options)
    found = merge_fisher(
        thetas, [f * factor for f in fishers], ones, [factor] * len(ones), **options
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("power", range(-149, -120))
def test_a_fisher_at_the_edge_of_float32_weighs_as_any_other(power):
    """Subnormal numbers, of which only powers of two are exact."""
    thetas = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])]
    fishers = [torch.tensor([2.0**power, 0.0]), torch.tensor([2.0**power, 2.0**power])]
    merged = merge_fisher(thetas, fishers, [1.0, 1.0], [2.0**power] * 2, floor=0)
    assert merged.tolist() == [2.0, 5.0]


@given(problems(), st.sampled_from([0.0, 1e-6]), st.randoms())
def test_order_changes_nothing(problem, floor, random):
    thetas, *_ = problem
    order = list(range(len(thetas)))
    random.shuffle(order)
    shuffled = [[values[i] for i in order] for values in problem]
    close(merge_fisher(*shuffled, floor=floor), merge_fisher(*problem, floor=floor), thetas)


@given(problems(), st.sampled_from([0.0, 1e-6]), st.booleans())
def test_lambda_zero_removes_a_model(problem, floor, normalize):
    thetas, fishers, lambdas, sizes = problem
    options = {"floor": floor, "normalize_fishers": normalize}
    nan = torch.full((SIZE,), math.nan)
    merged = merge_fisher(
        [*thetas, nan], [*fishers, nan], [*lambdas, 0.0], [*sizes, math.nan], **options
    )
    assert torch.equal(merged, merge_fisher(*problem, **options))


@given(problems(), st.sampled_from([0.0, 1e-6, 1.0]))
def test_where_nobody_knows_anything_the_lambdas_decide(problem, floor):
    thetas, fishers, lambdas, sizes = problem
    zeros = [torch.zeros_like(f) for f in fishers]
    close(
        merge_fisher(thetas, zeros, lambdas, sizes, floor=floor),
        isotropic(thetas, lambdas),
        thetas,
    )


@given(problems())
def test_one_common_scale_is_as_good_as_another(problem):
    """Without normalisation only the floor sees the scale."""
    thetas, fishers, lambdas, sizes = problem
    unscaled = [1.0] * len(thetas)
    expected = merge_oracle.merge_tensor(
        thetas, [f + 2**-60 for f in fishers], lambdas, unscaled, floor=0
    )
    plain = merge_fisher(
        thetas, [f + 2**-60 for f in fishers], lambdas, sizes, normalize_fishers=False, floor=0
    )
    close(plain, expected, thetas)


@settings(max_examples=30)
@given(problems(), st.sampled_from([torch.bfloat16, torch.float16]))
def test_low_precision_inputs_are_merged_in_float32(problem, dtype):
    thetas, *rest = problem
    low = [theta.clamp(-6e4, 6e4).to(dtype) for theta in thetas]
    merged = merge_fisher(low, *rest)
    assert merged.dtype == torch.float32
    assert torch.equal(merged, merge_fisher([theta.float() for theta in low], *rest))


def test_inputs_are_not_written_to():
    thetas = [torch.ones(3), torch.zeros(3)]
    fishers = [torch.full((3,), 2.0), torch.ones(3)]
    before = [t.clone() for t in (*thetas, *fishers)]
    merge_fisher(thetas, fishers, [1, 2], [1, 1])
    assert all(map(torch.equal, before, (*thetas, *fishers)))


@given(problems(), st.sampled_from([0.0, 1e-6]), st.integers(1, SIZE))
def test_large_tensors_are_merged_some_elements_at_a_time(problem, floor, size):
    """Also where nobody knows anything in one block, and somebody does in the next."""
    thetas, fishers, *rest = problem
    for values in fishers:
        values[:2] = 0
    whole = merge_fisher(thetas, fishers, *rest, floor=floor)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diagonal, "BLOCK", size)
        close(merge_fisher(thetas, fishers, *rest, floor=floor), whole, thetas)
        # Not in one piece, as what was converted or turned.
        apart = [[torch.stack([x, x]).mT for x in tensors] for tensors in (thetas, fishers)]
        close(merge_fisher(*apart, *rest, floor=floor), torch.stack([whole] * 2).mT, thetas)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_result_is_rounded_once_to_the_dtype_asked_for(dtype):
    thetas = [torch.randn(7, generator=torch.manual_seed(n)) for n in (1, 2)]
    system = kind_for("fisher").system([(t.exp(),) for t in thetas], [1, 2], scales=[1, 1])
    wide = equation.solve(system, thetas, [1, 2])
    assert torch.equal(equation.solve(system, thetas, [1, 2], dtype=dtype), wide.to(dtype))


def test_float64_stays_float64():
    thetas = [torch.ones(1, dtype=torch.float64), torch.zeros(1)]
    merged = merge_fisher(thetas, [torch.ones(1)] * 2, [1, 1], [1, 1])
    assert merged.dtype == torch.float64


@pytest.mark.parametrize("lambdas", [[1e300, 1e300], [1e-300, 1e-300], [1, 1]])
def test_relative(lambdas):
    assert relative(lambdas) == [1, 1]
