"""Kind `identity`: every Cᵢ is the identity, the *isotropic* merge.

θ* = Σ λᵢ θᵢ / Σ λᵢ, mergekit's `linear`. It needs nothing measured.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fisher_mergekit.precision.diagonal import relative, weighted_mean


def solve(thetas: Sequence[Tensor], lambdas: Sequence[float]) -> Tensor:
    """Return the lambda-weighted mean; `lambdas` are n non-negative numbers, not all zero."""
    return weighted_mean(thetas, relative(lambdas))
