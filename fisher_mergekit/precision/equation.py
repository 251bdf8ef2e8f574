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
    """

    @property
    def models(self) -> Sequence[int]: ...  # noqa: D102

    @property
    def dtype(self) -> torch.dtype | None: ...  # noqa: D102

    def weigh(self, index: int, difference: Tensor) -> Tensor:
        """Return λᵢ Cᵢ x of one model, a new tensor."""
        ...

    def solve(self, right: Tensor, name: str = "") -> Tensor:
        """Return S⁻¹ x, zero where S has no inverse.

        Args:
            right: may be overwritten.
            name: the tensor's, for the log.
        """
        ...


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
    mean = weighted_mean([thetas[i] for i in present], [lambdas[i] for i in present], dtype=dtype)
    right = torch.zeros_like(mean)
    for i in present:
        right += system.weigh(i, thetas[i].to(dtype) - mean)
    return mean + system.solve(right, name)
