r"""Factors of Kronecker products C = outputs ⊗ inputs, and the inverses of their sums.

A precision of a matrix W `[o, i]` that is such a product acts on it from both sides,
C · W = B W A, and never has to be written down. A *factor* A or B is

    a symmetric positive semidefinite matrix `[…, d, d]`, or
    the diagonal of one: a column `[…, d, 1]`, or `[d]`

with leading axes for weights that are several matrices, such as packed experts. Everything here is
computed in float64.

Sums of factors are scaled to a unit diagonal before they are factorised: what a measured factor
lost to rounding is relative to its diagonal, and inputs of a language model differ in size by
orders of magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def as_factor(factor: Tensor) -> Tensor:
    """Return a factor as it is, or a bare diagonal `[d]` as a column."""
    return factor.unsqueeze(-1) if factor.ndim == 1 else factor


def is_diagonal(factor: Tensor) -> bool:
    """Whether a factor is the diagonal of a matrix, as a column."""
    return factor.shape[-1] == 1


def diagonal(factor: Tensor) -> Tensor:
    """Return a factor's diagonal as a float64 column `[…, d, 1]`."""
    if is_diagonal(factor):
        return factor.double()
    return factor.diagonal(dim1=-2, dim2=-1).unsqueeze(-1).double()


def times(factor: Tensor, x: Tensor, offdiagonal: float = 1.0) -> Tensor:
    """Return A x for x `[…, d, k]`, in float64, with the off-diagonals of A multiplied first."""
    wide = factor.double()
    if is_diagonal(factor):
        return wide * x
    product = wide @ x
    if offdiagonal != 1:
        product.mul_(offdiagonal).add_(diagonal(factor) * x, alpha=1 - offdiagonal)
    return product


def shrunk(factor: Tensor, offdiagonal: float) -> Tensor:
    """Return a factor with its off-diagonals multiplied, in its own dtype."""
    if is_diagonal(factor) or offdiagonal == 1:
        return factor
    result = factor * offdiagonal
    result.diagonal(dim1=-2, dim2=-1).copy_(factor.diagonal(dim1=-2, dim2=-1))
    return result


def weighted_sum(
    factors: Sequence[Tensor],
    weights: Sequence[float | Tensor],
    offdiagonal: float = 1.0,
) -> Tensor:
    """Return Σ wᵢ Aᵢ in float64: a column if all are, else a matrix.

    Args:
        factors: of one width.
        weights: numbers, or tensors `[…, 1, 1]`.
        offdiagonal: what the off-diagonals are multiplied by.
    """
    device = factors[0].device
    wide = [torch.as_tensor(w, dtype=torch.float64, device=device) for w in weights]
    if all(map(is_diagonal, factors)):
        zero = torch.zeros((), dtype=torch.float64, device=device)
        return sum((f.double() * w for f, w in zip(factors, wide, strict=True)), zero)
    *lead, width, _ = factors[0].shape
    total = torch.zeros(*lead, width, width, dtype=torch.float64, device=device)
    on_diagonal = total.diagonal(dim1=-2, dim2=-1)
    for factor, weight in zip(factors, wide, strict=True):
        if not is_diagonal(factor):
            total.addcmul_(factor.double(), weight)  # a wide layer's factor is gigabytes
    kept = on_diagonal.clone()
    total *= offdiagonal
    on_diagonal.copy_(kept)
    for factor, weight in zip(factors, wide, strict=True):
        if is_diagonal(factor):
            on_diagonal += (factor.double() * weight).squeeze(-1)
    return total


def noise(factors: Sequence[Tensor]) -> float:
    """Return how large an eigenvalue rounding may make, of a sum with a unit diagonal.

    float32 sums of many rows are good to about 1e-6; numbers that are rounded each by itself to
    bfloat16 are a random matrix, whose norm grows with the root of its width. The coarsest counts.
    """
    coarse = max(torch.finfo(f.dtype).eps if f.dtype.itemsize < 4 else 0.0 for f in factors)
    return max(1e-6, coarse * math.sqrt(factors[0].shape[-2]) / 16)


@dataclass(frozen=True)
class Inverse:
    """The inverse of a sum of factors, where anything was seen, and zero elsewhere.

    Attributes:
        scale: `[…, d, 1]`, what a unit diagonal is made with; 0 for a dead input.
        lower: `[…, d, d]`, the scaled sum's Cholesky factor; or
        root: `[…, d, d]`, R with R Rᵀ its inverse on what was seen. A diagonal needs neither.
    """

    scale: Tensor
    lower: Tensor | None = None
    root: Tensor | None = None

    def times(self, right: Tensor) -> Tensor:
        """Return the inverse times x, `[…, d, k]`."""
        found = right * self.scale
        if self.lower is not None:
            found = torch.cholesky_solve(found, self.lower)
        elif self.root is not None:
            found = self.root @ (self.root.mT @ found)
        return found.mul_(self.scale)


def invert(total: Tensor, rounding: float, *, least: float = 0.0) -> Inverse:
    """Invert a sum of factors where it is more than rounding.

    Args:
        total: a matrix or a column, float64; it is overwritten.
        rounding: its `noise`.
        least: a bound from below of its eigenvalues with a unit diagonal, if one is known. If it
            is above the noise, the cheaper factorisation (Cholesky) will do.
    """
    scale = _to_unit_diagonal(total)
    if is_diagonal(total):
        return Inverse(scale)
    if least > rounding:
        lower, failed = torch.linalg.cholesky_ex(total)
        if not failed.any():
            return Inverse(scale, lower=lower)
    return Inverse(scale, root=_root(total, rounding))


@dataclass(frozen=True)
class Basis:
    """Vectors in which factors Aᵢ, taken relative to their mean diagonals, are nearly diagonal.

    Their sum is the identity in this basis, on what was seen. Two factors are diagonal in it, and
    one; of more, two different sums are.

    Attributes:
        vectors: U `[…, d, d]`, zero columns for what was not seen; a column of d numbers where all
            factors are diagonals.
        factors: one a factor, Uᵀ Aᵢ U, float64; a column where all factors are diagonals.
        noise: one a factor, what its rounding may amount to on the diagonal there, `[…, d, 1]`.
        rounding: of all factors, relative to their diagonals; 0 for diagonals.
    """

    vectors: Tensor
    factors: tuple[Tensor, ...]
    noise: tuple[Tensor, ...]
    rounding: float

    def into(self, x: Tensor) -> Tensor:
        """Return Uᵀ x for x `[…, d, k]`."""
        return self.vectors * x if is_diagonal(self.vectors) else self.vectors.mT @ x

    def out_of(self, x: Tensor) -> Tensor:
        """Return U x."""
        return self.vectors * x if is_diagonal(self.vectors) else self.vectors @ x


def size(factor: Tensor) -> Tensor:
    """Return the mean of a factor's diagonal, `[…, 1, 1]`."""
    return diagonal(factor).mean((-2, -1), keepdim=True)


def divided(x: float | Tensor, by: Tensor) -> Tensor:
    """Return the quotient, or the dividend where the divisor is 0."""
    return x / torch.where(by > 0, by, 1.0)


def common_basis(factors: Sequence[Tensor]) -> Basis:
    """Return a basis in which all factors are as diagonal as can be had from two decompositions."""
    weights = [divided(1.0, size(factor)) for factor in factors]
    total = weighted_sum(factors, weights)
    scale = _to_unit_diagonal(total)
    if is_diagonal(total):
        there = tuple(factor.double() * scale**2 for factor in factors)
        return Basis(scale, there, (torch.zeros_like(scale),) * len(factors), 0.0)
    rounding = noise(factors)
    vectors = _root(total, rounding)
    if len(factors) > 1:
        # Different weights, and none of them zero: what was seen has eigenvalues from 1 on.
        tilts = [1 + i / (len(factors) - 1) for i in range(len(factors))]
        tilted = weighted_sum(factors, [w * t for w, t in zip(weights, tilts, strict=True)])
        tilted.mul_(scale).mul_(scale.mT)
        vectors = vectors @ torch.linalg.eigh(vectors.mT @ tilted @ vectors)[1]
    vectors.mul_(scale)
    squares = vectors.square().mT
    unsure = tuple(squares @ diagonal(factor) * rounding for factor in factors)
    there = tuple(vectors.mT @ times(factor, vectors) for factor in factors)
    return Basis(vectors, there, unsure, rounding)


_SEEN = 10
"""How many times the noise an eigenvalue is that somebody is held to have seen."""


def _root(total: Tensor, rounding: float) -> Tensor:
    """Return R with R Rᵀ the inverse of a matrix with a unit diagonal, on what was seen."""
    least = _SEEN * rounding
    lowered = total.clone()
    lowered.diagonal(dim1=-2, dim2=-1).sub_(least)
    if not torch.linalg.cholesky_ex(lowered).info.any():
        # All eigenvalues are above that, and a decomposition three times as fast will do.
        lower = torch.linalg.cholesky(total)
        eye = torch.eye(total.shape[-1], dtype=total.dtype, device=total.device)
        root: Tensor = torch.linalg.solve_triangular(lower.mT, eye.expand_as(total), upper=True)
        return root
    values, vectors = torch.linalg.eigh(total)
    seen = values > least
    root = vectors * (torch.where(seen, values, 1.0).rsqrt() * seen).unsqueeze(-2)
    return root


def _to_unit_diagonal(total: Tensor) -> Tensor:
    """Scale a matrix in place, a column not; return what with."""
    on_diagonal = diagonal(total)
    alive = on_diagonal > 0
    scale = torch.where(alive, on_diagonal, 1.0).rsqrt() * alive
    if not is_diagonal(total):
        total.mul_(scale).mul_(scale.mT)
        total.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    return scale
