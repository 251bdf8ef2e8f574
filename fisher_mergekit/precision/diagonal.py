"""Diagonal Cᵢ: the equation falls apart into one an element, a weighted mean.

Format: tensors of one shape and device, any floating dtype; a weight is a number or a tensor of
that shape. Arithmetic is in float32, or in float64 where an input is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Weight = float | Tensor


def working_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """Return the dtype that the merge computes in: float32, or float64 if any input has it."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def relative(lambdas: Sequence[float]) -> list[float]:
    """Return the lambdas divided by the largest: the merge is the same, the numbers are tame.

    Only their ratios count, but 1e300 would overflow and 1e-300 vanish in float32.
    """
    largest = max(lambdas)
    return [value / largest for value in lambdas]


def counting(lambdas: Sequence[float]) -> list[int]:
    """Return the indices of the models that are there: a lambda of 0 removes one."""
    return [i for i, value in enumerate(lambdas) if value != 0]


def weighted_mean(
    thetas: Sequence[Tensor], weights: Sequence[float], *, dtype: torch.dtype | None = None
) -> Tensor:
    """Return Σ wᵢ θᵢ / Σ wᵢ.

    The mean is taken of the differences from the first theta. That is the same value, but where
    all thetas agree it is exactly theirs, and in low precision nothing large cancels.

    Args:
        thetas: n tensors of one shape; borrowed, never written to.
        weights: n numbers whose sum is not zero.
        dtype: to compute in; None is the working dtype.

    Returns:
        A new tensor in that dtype.
    """
    dtype = dtype or working_dtype(thetas)
    reference = thetas[0].to(dtype)
    result = torch.zeros_like(reference)
    total = sum(weights)
    for theta, weight in zip(thetas[1:], weights[1:], strict=True):
        if weight != 0:
            result.add_(theta.to(dtype) - reference, alpha=weight / total)
    return result.add_(reference)


@dataclass(frozen=True)
class Elementwise:
    """Σᵢ Wᵢ for diagonal Wᵢ = λᵢ Cᵢ.

    Attributes:
        models: indices of the models that are in it.
        weight: gives a model's Wᵢ in a dtype, a number or a new tensor. It is asked again rather
            than kept, because weights are as large as models.
    """

    models: Sequence[int]
    weight: Callable[[int, torch.dtype], Weight]
    dtype: torch.dtype | None = None
    rows_apart: bool = False

    def weigh(self, index: int, difference: Tensor) -> Tensor:
        """Return Wᵢ x of one model; `difference` is overwritten."""
        return difference.mul_(self.weight(index, difference.dtype))

    def solve(self, right: Tensor, name: str = "") -> Tensor:
        """Return (Σ Wᵢ)⁻¹ x, zero where all weights are; `right` is overwritten."""
        total: Weight = 0.0
        for i in self.models:
            weight = self.weight(i, right.dtype)
            if isinstance(weight, Tensor) and isinstance(total, Tensor):
                total.add_(weight)
            else:
                total = weight + total
        right.div_(total)
        return right.masked_fill_(total == 0, 0) if isinstance(total, Tensor) else right
