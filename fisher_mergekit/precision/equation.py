r"""The one equation of every merge, S θ = Σᵢ λᵢ Cᵢ θᵢ with S = Σᵢ λᵢ Cᵢ.

What is solved for is the difference from the λ-weighted mean θ̄,

    S Δ = Σᵢ λᵢ Cᵢ (θᵢ − θ̄),   θ = θ̄ + Δ

which is the same equation. But where all models agree they come back unchanged, and in directions
in which no model is sure of anything, and S has no inverse, Δ is zero and the mean stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fisher_mergekit.precision.diagonal import relative, weighted_mean, working_dtype


class System(Protocol):
    """S = Σᵢ λᵢ Cᵢ of one tensor, or of several that share their precisions.

    Attributes:
        models: indices of the models that are in it.
        dtype: what it computes in; None leaves that to the thetas.
        rows_apart: whether each row of a matrix has the same equation of its own.
    """

    @property
    def models(self) -> Sequence[int]: ...  # noqa: D102

    @property
    def dtype(self) -> torch.dtype | None: ...  # noqa: D102

    @property
    def rows_apart(self) -> bool: ...  # noqa: D102

    def weigh(self, index: int, difference: Tensor) -> Tensor:
        """Return λᵢ Cᵢ x of one model; `difference` may be overwritten."""
        ...

    def solve(self, right: Tensor, name: str = "") -> Tensor:
        """Return S⁻¹ x, zero where S has no inverse.

        Args:
            right: may be overwritten.
            name: the tensor's, for the log.
        """
        ...


BLOCK = 1 << 24
"""Elements of the rows that are solved at once, where they can be: float64 is wide."""


def solve(
    system: System, thetas: Sequence[Tensor], lambdas: Sequence[float], *, name: str = ""
) -> Tensor:
    """Return the merged tensor.

    Args:
        system: Σᵢ λᵢ Cᵢ.
        thetas: n tensors of one shape; borrowed, never written to.
        lambdas: n, those of the system.
        name: the tensor's, for the log.

    Returns:
        A new tensor in the dtype that the system computes in.
    """
    lambdas = relative(lambdas)
    present = list(system.models)
    dtype = system.dtype or working_dtype(thetas[i] for i in present)
    weights = [lambdas[i] for i in present]

    def solved(rows: slice) -> Tensor:
        own = {i: thetas[i][..., rows, :] if system.rows_apart else thetas[i] for i in present}
        mean = weighted_mean(list(own.values()), weights, dtype=dtype)
        right = torch.zeros_like(mean)
        for i, theta in own.items():
            right += system.weigh(i, theta.to(dtype) - mean)
        return mean.add_(system.solve(right, name))

    first = thetas[present[0]]
    if not system.rows_apart or first.numel() <= BLOCK:
        return solved(slice(None))
    result = torch.empty(first.shape, dtype=dtype, device=first.device)
    height = max(1, BLOCK * first.shape[-2] // first.numel())
    for start in range(0, first.shape[-2], height):
        rows = slice(start, start + height)
        result[..., rows, :] = solved(rows)
    return result
