r"""Kind `kfac`: Cᵢ = Bᵢ ⊗ Aᵢ, the Kronecker-factored Fisher of a linear layer.

A is the mean of x xᵀ over the layer's inputs x, B the mean of g gᵀ over the gradients g of
log p(y|x) with respect to its outputs; their product approximates the layer's Fisher information
(K-FAC: Martens & Grosse 2015, arXiv 1503.05671). The merge solves

    Σᵢ λᵢ Bᵢ Δ Aᵢ = Σᵢ λᵢ Bᵢ (Wᵢ − W̄) Aᵢ,   W* = W̄ + Δ

by conjugate gradients (MaTS: Tam et al. 2023, arXiv 2312.04339). With Bᵢ the identity it is the
kind `gram`.

A sum of Kronecker products is none, and so has no cheap inverse. But two symmetric matrices are
diagonal in one basis (that of their pencil), and then so is the sum of two products. So the
equation is solved in such a basis, with the sum's diagonal as the preconditioner; two models need
one step. The inputs' basis serves all layers that share them.

Weights that every model knows little about can be lost to rounding in that basis, which mixes them
with others. So the solution is refined in the weights' own coordinates, where their own diagonal
stands in the preconditioner too. This is left out where directions were dropped as rounding, for
only the basis tells those from the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fisher_mergekit.precision import gram
from fisher_mergekit.precision.diagonal import counting, relative
from fisher_mergekit.precision.iterative import conjugate_gradients, refine
from fisher_mergekit.precision.kronecker import (
    Basis,
    as_factor,
    common_basis,
    diagonal,
    divided,
    shrunk,
    size,
    times,
)
from fisher_mergekit.precision.statistics import Statistics

STATISTICS = Statistics(inputs="rows", outputs=True)
"""A weight's gradient is a sum over rows of g xᵀ. As if g and x were independent, and rows too,

    mean over examples of Σ (x xᵀ) ⊗ (g gᵀ)  ≈  (mean over rows of x xᵀ) ⊗ (Σ g gᵀ / examples)
"""

OFFDIAGONAL = 0.9
"""Default factor of the off-diagonals. The paper has 1; what few rows say of how inputs go together
with one another then carries the solution far from all models."""
TOLERANCE = 1e-6
"""Default relative residual to stop at: what the measured factors' own rounding amounts to."""
ITERATIONS = 1000
"""Default limit of the iterations of one tensor."""


@dataclass(frozen=True)
class TwoSided:
    """Σᵢ tᵢ Bᵢ ⊗ Aᵢ.

    Attributes:
        models: indices of the models that are in it.
        inputs: each model's A, by its index.
        outputs: each model's B, by its index.
        shares: each model's t, by its index, `[…, 1, 1]`.
        bases: the outputs' and the inputs', in which the sum is nearly diagonal.
    """

    models: Sequence[int]
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    shares: Mapping[int, Tensor]
    bases: tuple[Basis, Basis]
    tolerance: float
    iterations: int
    dtype: torch.dtype = torch.float64

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """Return it whole: all elements have one equation together."""
        return (tensor,)

    def equations(self, result: Tensor, dtype: torch.dtype) -> Iterator[Whole]:
        """Yield the one."""
        yield Whole(self)

    def inverse_times(self, right: Tensor, name: str = "") -> Tensor:
        """Return (Σ tᵢ Bᵢ ⊗ Aᵢ)⁻¹ x, to the tolerance; zero for elements of which S has nothing."""
        own = [(share, self.outputs[i], self.inputs[i]) for i, share in self.shares.items()]
        elements = torch.zeros_like(right)
        for share, b, a in own:
            elements += share * diagonal(b) * diagonal(a).mT
        start, inverse, complete, ended = self._in_bases(right, elements, name)
        outputs, inputs = self.bases

        def precondition(r: Tensor) -> Tensor:
            return self._out_of(inverse * self._into(r)) + divided(r, elements)

        found = refine(
            partial(_sum_times, own),
            right,
            start,
            which=complete,
            ended=ended,
            precondition=precondition,
            noise=(outputs.rounding + inputs.rounding) * elements,
            tolerance=self.tolerance,
            iterations=self.iterations,
            name=name,
        )
        return found.mul_(elements > 0)

    def _in_bases(
        self, right: Tensor, elements: Tensor, name: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Solve in the bases.

        Returns:
            The solution; the inverse of the sum's diagonal there, zero in directions that may be
            nothing but rounding; and `[…, 1, 1]`, which systems have no such direction, and which
            came to an end.
        """
        outputs, inputs = self.bases
        terms = list(zip(self.shares.values(), outputs.factors, inputs.factors, strict=True))
        on_diagonal = noise = torch.zeros_like(right)
        for (share, b, a), of_b, of_a in zip(terms, outputs.noise, inputs.noise, strict=True):
            b, a = diagonal(b), diagonal(a)
            on_diagonal = on_diagonal + share * b * a.mT
            noise = noise + share * (b.abs() * of_a.mT + of_b * (a.abs() + of_a).mT)
        seen = on_diagonal > noise
        complete = _count(seen) >= _count(elements > 0)
        found, ended = conjugate_gradients(
            partial(_sum_times, terms),
            self._into(right),
            on_diagonal=on_diagonal,
            noise=noise,
            refined=complete,
            tolerance=self.tolerance,
            iterations=self.iterations,
            name=name,
        )
        return self._out_of(found), divided(seen.to(right.dtype), on_diagonal), complete, ended

    def _into(self, x: Tensor) -> Tensor:
        outputs, inputs = self.bases
        return outputs.into(inputs.into(x.mT).mT)

    def _out_of(self, x: Tensor) -> Tensor:
        outputs, inputs = self.bases
        return outputs.out_of(inputs.out_of(x.mT).mT)


class Whole:
    """The equation of a tensor."""

    starts_at_mean = True

    def __init__(self, system: TwoSided):
        self._system = system
        self._right: Tensor | None = None

    def add(self, index: int, theta: Tensor, reference: Tensor) -> None:
        """Add tᵢ Bᵢ (θᵢ − ρ) Aᵢ of one model to the right side."""
        system = self._system
        product = _product(system.outputs[index], theta - reference, system.inputs[index])
        product.mul_(system.shares[index])
        self._right = product if self._right is None else self._right.add_(product)

    def solve(self, reference: Tensor, out: Tensor, name: str = "") -> None:
        """Write ρ plus the solution, to the tolerance."""
        assert self._right is not None
        torch.add(reference, self._system.inverse_times(self._right, name), out=out)


def _product(b: Tensor, x: Tensor, a: Tensor) -> Tensor:
    """Return B x A."""
    return times(b, times(a, x.mT).mT)


def _sum_times(terms: Sequence[tuple[Tensor, Tensor, Tensor]], x: Tensor) -> Tensor:
    """Return Σ t B x A, of (t, B, A)."""
    return sum((share * _product(b, x, a) for share, b, a in terms), torch.zeros_like(x))


def _count(these: Tensor) -> Tensor:
    """Return how many are true, `[…, 1, 1]`."""
    return these.sum((-2, -1), keepdim=True)


def common(
    inputs: Sequence[Tensor],
    lambdas: Sequence[float],
    *,
    offdiagonal: float = OFFDIAGONAL,
    **_: Any,
) -> Basis:
    """Return a basis for the inputs: one for all layers that share them."""
    return common_basis([shrunk(as_factor(inputs[i]), offdiagonal) for i in counting(lambdas)])


def system(
    precisions: Sequence[tuple[Tensor, ...]],
    lambdas: Sequence[float],
    *,
    scales: Sequence[float] | None = None,
    normalize_fishers: bool = True,
    offdiagonal: float = OFFDIAGONAL,
    tolerance: float = TOLERANCE,
    iterations: int = ITERATIONS,
    shared: Basis | None = None,
) -> TwoSided | gram.OneSided:
    """Return Σ λᵢ/sᵢ Bᵢ ⊗ Aᵢ.

    Args:
        precisions: n pairs (A of the inputs, B of the outputs), factors as `kronecker.py` has them;
            where all are (A,) alone, B is the identity.
        lambdas: n non-negative numbers, not all zero. A model with lambda 0 is not there.
        scales: each model's root mean square over everything that is merged, positive.
        normalize_fishers: divide each precision by its scale, where there are any.
        offdiagonal: 0 to 1, what the off-diagonals of both factors are multiplied by.
        tolerance: relative residual to stop at.
        iterations: at most so many.
        shared: what `common` gives for these inputs, if it is there already.
    """
    lambdas = relative(lambdas)
    models = counting(lambdas)
    if normalize_fishers and scales is not None:
        smallest = min(scales[i] for i in models)
        lambdas = [lam and lam * (smallest / s) for lam, s in zip(lambdas, scales, strict=True)]
    if all(len(precisions[i]) == 1 for i in models):
        return gram.system(precisions, lambdas, offdiagonal=offdiagonal)
    inputs, outputs = (
        [shrunk(as_factor(pair[side]), offdiagonal) for pair in precisions] for side in (0, 1)
    )
    shared = shared or common_basis([inputs[i] for i in models])
    bases = (common_basis([outputs[i] for i in models]), shared)

    # Precisions are taken relative to the sum of their sizes: numbers of any size are tame.
    sizes = {i: size(inputs[i]) * size(outputs[i]) for i in models}
    total = sum((sizes[i] * lambdas[i] for i in models), torch.zeros_like(sizes[models[0]]))
    shares = {i: divided(lambdas[i], total) for i in models}
    return TwoSided(models, inputs, outputs, shares, bases, tolerance, iterations)
