"""The solution of Σᵢ Wᵢ θ = Σᵢ Wᵢ θᵢ for diagonal Wᵢ: the elementwise weighted mean.

Format: `thetas` are n tensors of one shape and device, any floating dtype; a weight is a number or
a tensor of that shape. Arithmetic is in float32, or in float64 where an input is float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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


def weighted_mean(thetas: Sequence[Tensor], weights: Sequence[Weight]) -> Tensor:
    """Return Σ wᵢ θᵢ / Σ wᵢ, elementwise.

    The mean is taken of the differences from the first theta. That is the same value, but where
    all thetas agree it is exactly theirs, and in low precision nothing large cancels.

    Args:
        thetas: n tensors of one shape; borrowed, never written to.
        weights: n non-negative numbers or tensors of that shape. Where they are all zero, the
            result is NaN: the kind that makes the weights decides what stands there.

    Returns:
        A new tensor in the working dtype.
    """
    dtype = working_dtype(thetas)
    reference = thetas[0].to(dtype)
    numerator = torch.zeros_like(reference)
    denominator: Weight = 0.0
    for theta, weight in zip(thetas, weights, strict=True):
        difference = theta.to(dtype) - reference
        # addcmul_ reads each operand once; a number is cheaper as alpha.
        if isinstance(weight, Tensor):
            numerator.addcmul_(difference, weight.to(dtype))
        else:
            numerator.add_(difference, alpha=weight)
        denominator = denominator + weight
    return numerator.div_(denominator).add_(reference)
