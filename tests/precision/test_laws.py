"""One suite of laws for every kind of precision: it is one equation."""

from dataclasses import dataclass, field
from typing import Any

import dense_oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fisher_mergekit.precision import solve

OUT, WIDTH = 4, 5


few = settings(max_examples=25)
"""Six laws of six forms; each draw is a problem of its own."""


def isotropic(thetas, lambdas):
    return sum(lam * theta.double() for lam, theta in zip(lambdas, thetas, strict=True)) / sum(
        lambdas
    )


@dataclass
class Problem:
    """Models to merge by one kind; options that are lists have one entry a model."""

    kind: str
    thetas: list
    precisions: list
    lambdas: list
    options: dict[str, Any] = field(default_factory=dict)

    def solved(self, **changes):
        given = {**vars(self), **changes}
        return solve(
            given["kind"], given["thetas"], given["precisions"], given["lambdas"],
            **given["options"],
        )  # fmt: skip

    def reordered(self, order):
        """Return the problem with some of its models, in another order."""

        def pick(values):
            return [values[i] for i in order]

        options = {k: pick(v) if isinstance(v, list) else v for k, v in self.options.items()}
        return Problem(
            self.kind, pick(self.thetas), pick(self.precisions), pick(self.lambdas), options
        )

    def dense(self):
        """Return the weighted Cᵢ, written down."""
        own = []
        for i in range(len(self.thetas)):
            mine = {k: v for k, v in self.options.items() if k in ("floor", "offdiagonal")}
            if "scales" in self.options:
                mine["scale"] = self.options["scales"][i]
            own.append(mine)
        return [
            getattr(dense_oracle, self.kind)(theta.shape, precision, lam, **mine)
            for theta, precision, lam, mine in zip(
                self.thetas, self.precisions, self.lambdas, own, strict=True
            )
        ]


def factor(generator, width, form):
    """Return the Gram of some random rows, of inputs of very different sizes; or a diagonal."""
    size = 10.0 ** torch.randint(-2, 3, (width,), generator=generator)
    if form == "diagonal":
        return (torch.rand(width, generator=generator) + 0.1) * size
    rows = torch.randn(3 * width, width, generator=generator) * size
    return rows.mT @ rows


def problem_of(kind, form, count, seed):
    generator = torch.Generator().manual_seed(seed)
    thetas = list(torch.randn(count, OUT, WIDTH, generator=generator))
    lambdas = (10 ** (2 * torch.rand(count, generator=generator) - 1)).tolist()
    scales = (10 ** (4 * torch.rand(count, generator=generator) - 2)).tolist()
    options = {}
    if kind == "identity":
        precisions = [()] * count
    elif kind == "fisher":
        shape = (count, OUT, WIDTH)
        precisions = [(x.exp(),) for x in 3 * torch.randn(shape, generator=generator)]
        options = {"scales": scales, "floor": 1e-3}
    elif kind == "gram":
        precisions = [(factor(generator, WIDTH, form),) for _ in range(count)]
    else:
        precisions = [
            (factor(generator, WIDTH, form), factor(generator, OUT, "matrix")) for _ in range(count)
        ]
        offdiagonal = (1.0, 0.9)[seed % 2]
        options = {"scales": scales, "tolerance": 1e-12, "offdiagonal": offdiagonal}
    return Problem(kind, thetas, precisions, lambdas, options)


def problems(kind, form):
    build = lambda count, seed: problem_of(kind, form, count, seed)  # noqa: E731
    return st.builds(build, st.integers(1, 4), st.integers(0, 2**32))


every_kind = pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("identity", None),
        ("fisher", None),
        ("gram", "matrix"),
        ("gram", "diagonal"),
        ("kfac", "matrix"),
        ("kfac", "diagonal"),
    ],
)


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


@every_kind
@few
@given(data=st.data())
def test_it_solves_the_equation_as_written_down(kind, form, data):
    problem = data.draw(problems(kind, form))
    close(problem.solved(), dense_oracle.solution(problem.dense(), problem.thetas))


@every_kind
@few
@given(data=st.data())
def test_equal_inputs_come_back(kind, form, data):
    problem = data.draw(problems(kind, form))
    same = [problem.thetas[0]] * len(problem.thetas)
    assert torch.equal(problem.solved(thetas=same).float(), same[0])


@every_kind
@few
@given(data=st.data())
def test_equal_precisions_give_the_lambda_weighted_mean(kind, form, data):
    problem = data.draw(problems(kind, form))
    options = dict(problem.options)
    if "scales" in options:
        options["scales"] = [options["scales"][0]] * len(problem.thetas)
    equal = problem.precisions[:1] * len(problem.thetas)
    found = problem.solved(precisions=equal, options=options)
    close(found, isotropic(problem.thetas, problem.lambdas))


@every_kind
@few
@given(data=st.data(), factor=st.floats(1e-200, 1e200))
def test_scaling_all_lambdas_changes_nothing(kind, form, data, factor):
    problem = data.draw(problems(kind, form))
    close(problem.solved(lambdas=[x * factor for x in problem.lambdas]), problem.solved())


@every_kind
@few
@given(data=st.data(), random=st.randoms())
def test_order_changes_nothing(kind, form, data, random):
    problem = data.draw(problems(kind, form))
    order = list(range(len(problem.thetas)))
    random.shuffle(order)
    close(problem.reordered(order).solved(), problem.solved())


@every_kind
@few
@given(data=st.data())
def test_lambda_zero_removes_a_model(kind, form, data):
    """Whatever stands in its tensors."""
    problem = data.draw(problems(kind, form))
    more = problem.reordered([*range(len(problem.thetas)), 0])
    more.thetas[-1] = torch.full((OUT, WIDTH), torch.nan)
    more.precisions[-1] = tuple(x * torch.nan for x in more.precisions[-1])
    more.lambdas[-1] = 0.0
    assert torch.equal(more.solved(), problem.solved())


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@few
@given(data=st.data())
def test_inputs_are_not_written_to(kind, form, dtype, data):
    problem = data.draw(problems(kind, form))
    problem.thetas = [theta.to(dtype) for theta in problem.thetas]
    problem.precisions = [tuple(x.to(dtype) for x in p) for p in problem.precisions]
    held = [*problem.thetas, *(x for precision in problem.precisions for x in precision)]
    before = [x.clone() for x in held]
    problem.solved()
    assert all(map(torch.equal, held, before))


@every_kind
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-30, 1e30, 1e37])
@pytest.mark.parametrize("which", [[0], [0, 1]])
def test_precisions_of_any_size_give_numbers(kind, form, size, which):
    """Of one model, or of all; and where nobody is sure of anything, the mean."""
    problem = problem_of(kind, form, 2, seed=1)
    for i in which:
        scaled = tuple(x / x.abs().max() * size for x in problem.precisions[i])
        problem.precisions[i] = scaled
    found = problem.solved()
    assert found.isfinite().all()
    assert found.abs().max() < 1e4
    if size == 0 and len(which) == 2:
        close(found, isotropic(problem.thetas, problem.lambdas))
    if size == 0 and which == [0] and kind in ("gram", "kfac"):
        close(found, problem.thetas[1])  # only the other model knows anything


@pytest.mark.parametrize("kind", ["gram", "kfac"])
@pytest.mark.parametrize("form", ["matrix", "diagonal"])
def test_several_matrices_in_one_tensor_are_merged_one_by_one(kind, form):
    """Packed experts; one of which no token was routed to."""
    parts = [problem_of(kind, form, 2, seed) for seed in range(3)]
    parts[1].precisions = [tuple(x * 0 for x in p) for p in parts[1].precisions]
    for part in parts[1:]:
        part.lambdas, part.options = parts[0].lambdas, parts[0].options

    def column(x):
        return x.unsqueeze(-1) if x.ndim == 1 else x

    together = Problem(
        kind,
        [torch.stack([part.thetas[i] for part in parts]) for i in (0, 1)],
        [
            tuple(
                torch.stack([column(part.precisions[i][k]) for part in parts])
                for k in range(len(parts[0].precisions[0]))
            )
            for i in (0, 1)
        ],
        parts[0].lambdas,
        parts[0].options,
    )
    close(together.solved(), torch.stack([part.solved() for part in parts]), 1e-7)


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_thetas_are_merged_in_at_least_float32(kind, form, dtype):
    problem = problem_of(kind, form, 3, seed=2)
    low = [theta.to(dtype) for theta in problem.thetas]
    found = problem.solved(thetas=low)
    assert found.dtype in (torch.float32, torch.float64)
    assert torch.equal(found, problem.solved(thetas=[theta.float() for theta in low]))
