"""Kind `identity`: every Cᵢ is the identity, the *isotropic* merge.

θ* = Σ λᵢ θᵢ / Σ λᵢ, mergekit's `linear`. It needs nothing measured.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fisher_mergekit.precision.diagonal import Elementwise, Weight, counting, relative


def system(precisions: Sequence[tuple[Tensor, ...]], lambdas: Sequence[float]) -> Elementwise:
    """Return Σ λᵢ I; the precisions are empty."""
    lambdas = relative(lambdas)
    return Elementwise({i: Weight(lambdas[i]) for i in counting(lambdas)})
