r"""Kind `gram`: Cᵢ is the Gram matrix of the inputs of a linear layer, the same for each output.

With W `[o, i]` and Xᵢ the rows that the layer of model i got as inputs, the merge that differs
least from what every model did with its own inputs is a least-squares problem, Σᵢ λᵢ ‖Xᵢ Wᵀ −
Xᵢ Wᵢᵀ‖², and its solution

    W*ᵀ = (Σᵢ λᵢ Gᵢ)⁻¹ Σᵢ λᵢ Gᵢ Wᵢᵀ,   Gᵢ = XᵢᵀXᵢ      (RegMean: Jin et al. 2022, arXiv 2212.09849)

The off-diagonals of every Gram are multiplied by `offdiagonal` first: a few rows say less of how
inputs go together than of how large they are.

What is solved for is the difference from the λ-weighted mean W̄,

    S Δᵀ = Σᵢ λᵢ Gᵢ (Wᵢ − W̄)ᵀ,   S = Σᵢ λᵢ Gᵢ + ridge · tr(S)/d · I,   W* = W̄ + Δ

which is the same equation, but where the inputs of nobody point there is a direction in which Δ is
zero and W̄ stays, and where all models agree they come back unchanged. S is scaled to a unit
diagonal before it is factorised: rounding of a measured Gram is relative to its diagonal, and
inputs of a language model differ in size by orders of magnitude.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_mergekit.precision.diagonal import relative, weighted_mean, working_dtype

OFFDIAGONAL = 0.9
"""Default factor of the off-diagonals, as most merges with RegMean have it."""

_SAFE = 1e-4
"""Smallest eigenvalue, of a matrix with a unit diagonal, from which Cholesky needs no second look;
float64 leaves eleven digits then."""
_SEEN = 1e-5
"""Eigenvalue below which a direction, of a matrix with a unit diagonal, is the float32 rounding of
a measured Gram and nothing that anybody saw."""


@dataclass(frozen=True)
class Factor:
    """Σᵢ λᵢ Gᵢ, factorised: one for all outputs of all layers that share their inputs.

    Attributes:
        scale: `[…, i]`, float64, what a unit diagonal was made with; 0 for a dead input.
        root: `[…, i, i]`, float64, R with R Rᵀ the inverse of the scaled matrix on what was seen.
    """

    scale: Tensor
    root: Tensor | None
    lower: Tensor | None

    def solve(self, right: Tensor) -> Tensor:
        """Return Δᵀ with S Δᵀ = right, `[…, i, o]`, zero in the directions that nobody saw."""
        scaled = right * self.scale.unsqueeze(-1)
        if self.lower is not None:
            found = torch.cholesky_solve(scaled, self.lower)
        else:
            assert self.root is not None
            found = self.root @ (self.root.mT @ scaled)
        return found * self.scale.unsqueeze(-1)


def shrunk(gram: Tensor, offdiagonal: float) -> Tensor:
    """Return a new float64 Gram with its off-diagonals multiplied."""
    result = gram.double() * offdiagonal
    result.diagonal(dim1=-2, dim2=-1).copy_(gram.diagonal(dim1=-2, dim2=-1))
    return result


def factorize(
    grams: Sequence[Tensor],
    lambdas: Sequence[float],
    *,
    offdiagonal: float = OFFDIAGONAL,
    ridge: float = 0.0,
) -> Factor:
    """Factorise S = Σ λᵢ G̃ᵢ + ridge · tr/d · I.

    Args:
        grams: n symmetric positive semidefinite `[…, i, i]`.
        lambdas: n non-negative numbers, not all zero.
        offdiagonal: 0 to 1, what the off-diagonals are multiplied by.
        ridge: relative to the mean of the diagonal; pulls towards the λ-weighted mean.
    """
    lambdas = relative(lambdas)
    total = sum(shrunk(g, offdiagonal) * lam for g, lam in zip(grams, lambdas, strict=True))
    assert isinstance(total, Tensor)
    diagonal = total.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    diagonal.add_(ridge * mean)
    alive = diagonal > 0
    scale = torch.where(alive, diagonal, 1.0).rsqrt() * alive
    total = total * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    total.diagonal(dim1=-2, dim2=-1).copy_(torch.ones_like(diagonal))
    # The diagonal is at least (1 - offdiagonal) of it: a bound from below for every eigenvalue.
    if max(1 - offdiagonal, ridge / (1 + ridge) / total.shape[-1]) >= _SAFE:
        lower, failed = torch.linalg.cholesky_ex(total)
        if not failed.any():
            return Factor(scale, None, lower)
    values, vectors = torch.linalg.eigh(total)
    seen = values > _SEEN
    root = vectors * (torch.where(seen, values, 1.0).rsqrt() * seen).unsqueeze(-2)
    return Factor(scale, root, None)


def solve(
    thetas: Sequence[Tensor],
    grams: Sequence[Tensor],
    lambdas: Sequence[float],
    *,
    offdiagonal: float = OFFDIAGONAL,
    ridge: float = 0.0,
    factor: Factor | None = None,
) -> Tensor:
    """Return the merged matrix.

    Args:
        thetas: n matrices `[…, o, i]`, any floating dtype.
        grams: n symmetric positive semidefinite `[…, i, i]`, finite, on the same device.
        lambdas: n non-negative numbers, not all zero. A model with lambda 0 is not there.
        offdiagonal: 0 to 1, what the off-diagonals are multiplied by.
        ridge: relative to the mean of the diagonal of Σ λᵢ Gᵢ; pulls towards the λ-weighted mean.
        factor: of the same grams, lambdas, `offdiagonal` and `ridge`, if it is there already.

    Returns:
        A new tensor, float32 (float64 if any theta is). It is computed in float64.
    """
    present = [i for i, value in enumerate(lambdas) if value > 0]
    thetas = [thetas[i] for i in present]
    grams = [grams[i] for i in present]
    lambdas = relative([lambdas[i] for i in present])
    mean = weighted_mean([theta.double() for theta in thetas], lambdas)
    right = torch.zeros_like(mean.mT)
    for theta, gram, value in zip(thetas, grams, lambdas, strict=True):
        right += shrunk(gram, offdiagonal) @ (theta.double() - mean).mT * value
    if factor is None:
        factor = factorize(grams, lambdas, offdiagonal=offdiagonal, ridge=ridge)
    return (mean + factor.solve(right).mT).to(working_dtype(thetas))
