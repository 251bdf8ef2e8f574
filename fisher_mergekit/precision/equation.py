r"""The one equation of every merge, S θ = Σᵢ λᵢ Cᵢ θᵢ with S = Σᵢ λᵢ Cᵢ.

What is solved for is the difference from a reference ρ,

    S Δ = Σᵢ λᵢ Cᵢ (θᵢ − ρ),   θ = ρ + Δ

which is the same equation for any ρ. But where all models agree they come back unchanged. With the
λ-weighted mean as ρ it stays in directions in which no model is sure of anything, and S has no
inverse, because Δ is zero there. Where S has one any ρ will do. So kinds with factors begin at the
mean; diagonals at the first theta, which is at hand, and where nobody is sure the mean is put in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fisher_mergekit.precision.diagonal import relative, weighted_mean, working_dtype


class Equation(Protocol):
    """The equation of some elements of a tensor, which is put together model by model.

    Attributes:
        starts_at_mean: whether ρ is the λ-weighted mean. Otherwise it is the first model's theta,
            and that model is not added.
    """

    @property
    def starts_at_mean(self) -> bool: ...  # noqa: D102

    def add(self, index: int, theta: Tensor, reference: Tensor) -> None:
        """Add λᵢ Cᵢ (θᵢ − ρ) of one model to the right side."""
        ...

    def solve(self, reference: Tensor, out: Tensor, name: str = "") -> Tensor | None:
        """Write ρ + S⁻¹ times the right side.

        Args:
            reference: ρ.
            out: what is written to, in whatever dtype.
            name: the tensor's, for the log.

        Returns:
            Where S has no inverse, `out`'s shape, if ρ is not the mean: what is written there
            means nothing, and the mean takes its place. None if that is nowhere.
        """
        ...


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

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """Return the parts of a tensor that are solved one after the other, for little memory."""
        ...

    def equations(self, result: Tensor, dtype: torch.dtype) -> Iterator[Equation]:
        """Yield one for each part; when the next is asked for the last has been solved.

        Args:
            result: a tensor of the thetas' shape and device.
            dtype: what is computed in.
        """
        ...


def solve(
    system: System,
    thetas: Sequence[Tensor],
    lambdas: Sequence[float],
    *,
    name: str = "",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the merged tensor.

    Args:
        system: Σᵢ λᵢ Cᵢ.
        thetas: n tensors of one shape; borrowed, never written to.
        lambdas: n, those of the system.
        name: the tensor's, for the log.
        dtype: the result's, rounded to once; None is the one that the system computes in.

    Returns:
        A new tensor.
    """
    lambdas = relative(lambdas)
    present = list(system.models)
    weights = [lambdas[i] for i in present]
    first = thetas[present[0]]
    working = system.dtype or working_dtype(thetas[i] for i in present)
    result = torch.empty(first.shape, dtype=dtype or working, device=first.device)
    parts = (system.split(tensor) for tensor in (result, *(thetas[i] for i in present)))
    for equation, out, *own in zip(system.equations(result, working), *parts, strict=True):
        models = dict(zip(present, own, strict=True))
        if equation.starts_at_mean:
            reference = weighted_mean(own, weights, dtype=working)
        else:
            reference = models.pop(present[0]).to(working)
        for i, theta in models.items():
            equation.add(i, theta, reference)
        unseen = equation.solve(reference, out, name)
        if unseen is not None:
            out[unseen] = weighted_mean(own, weights, dtype=working)[unseen].to(out.dtype)
    return result
