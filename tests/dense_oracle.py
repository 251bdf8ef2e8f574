"""The equation written down whole: each kind's Cᵢ as one dense matrix, solved by least squares.

Slow and obvious. A matrix W `[o, i]` is laid row after row, so that B W A is (B ⊗ A) w.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def as_matrix(factor: Tensor) -> Tensor:
    """Return a factor as a matrix, also where it is given as a diagonal."""
    factor = factor.double()
    if factor.ndim == 1:
        return torch.diag(factor)
    return torch.diag(factor[:, 0]) if factor.shape[1] == 1 < factor.shape[0] else factor


def shrunk(gram: Tensor, offdiagonal: float) -> Tensor:
    matrix = as_matrix(gram)
    return offdiagonal * matrix + (1 - offdiagonal) * torch.diag(matrix.diag())


def rounded(factor: Tensor, offdiagonal: float) -> Tensor:
    """Return a factor with smaller off-diagonals, in its own dtype."""
    if factor.ndim == 1 or factor.shape[-1] == 1:
        return factor
    return torch.where(torch.eye(len(factor)) > 0, factor, factor * offdiagonal)


def identity(shape, precision, lam, **_) -> Tensor:
    return lam * torch.eye(shape.numel(), dtype=torch.float64)


def fisher(shape, precision, lam, *, scale, floor) -> Tensor:
    return lam * torch.diag(precision[0].double().flatten() / scale + floor)


def gram(shape, precision, lam, *, offdiagonal=0.9) -> Tensor:
    outputs = torch.eye(shape[0], dtype=torch.float64)
    return lam * torch.kron(outputs, shrunk(precision[0], offdiagonal))


def kfac(shape, precision, lam, *, scale=1.0, offdiagonal=0.9) -> Tensor:
    # In the factors' own dtype: their rounding is that of the measurement.
    inputs, outputs = (as_matrix(rounded(f, offdiagonal)) for f in precision)
    return lam / scale * torch.kron(outputs, inputs)


def solution(matrices: Sequence[Tensor], thetas: Sequence[Tensor]) -> Tensor:
    """Return θ of (Σ Cᵢ) θ = Σ Cᵢ θᵢ, for weighted matrices Cᵢ."""
    total = sum(matrices)
    right = sum(c @ theta.double().flatten() for c, theta in zip(matrices, thetas, strict=True))
    # A unit diagonal: the same solution, better conditioned.
    size = total.diag().sqrt()
    scaled = total / size / size[:, None]
    found = torch.linalg.lstsq(scaled, (right / size)[:, None]).solution[:, 0] / size
    return found.view(thetas[0].shape)
