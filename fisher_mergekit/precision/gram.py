r"""Kind `gram`: Cᵢ = identity ⊗ Aᵢ, with Aᵢ the Gram matrix of the inputs of a linear layer.

With W `[o, i]` and Xᵢ the rows that the layer of model i got as inputs, the merge that differs
least from what every model did with its own inputs is a least-squares problem, Σᵢ λᵢ ‖Xᵢ Wᵀ −
Xᵢ Wᵢᵀ‖², and its solution

    W*ᵀ = (Σᵢ λᵢ Aᵢ)⁻¹ Σᵢ λᵢ Aᵢ Wᵢᵀ,   Aᵢ = XᵢᵀXᵢ      (RegMean: Jin et al. 2022, arXiv 2212.09849)

The off-diagonals of every Gram are multiplied by `offdiagonal` first: a few rows say less of how
inputs go together than of how large they are. `ridge` adds a multiple of the identity, relative to
the mean of the diagonal, and pulls towards the λ-weighted mean.

The precision is the same for each output, so one factorisation serves all outputs, of all layers
that share their inputs. Inputs that are one-hot, as those of an embedding, have a diagonal Gram:
the counts of the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_mergekit.precision.diagonal import counting, relative
from fisher_mergekit.precision.kronecker import (
    Inverse,
    as_factor,
    invert,
    is_diagonal,
    noise,
    times,
    weighted_sum,
)
from fisher_mergekit.precision.statistics import Statistics

STATISTICS = Statistics(inputs="examples")
"""The paper's sum differs by the number of examples, which would weigh a model against another."""

OFFDIAGONAL = 0.9
"""Default factor of the off-diagonals, as most merges with RegMean have it."""
ELEMENTS = 1 << 24
"""Of the rows that are solved for at once: float64 is wide."""


@dataclass(frozen=True)
class OneSided:
    """Σᵢ λᵢ Aᵢ, applied to the inputs.

    Attributes:
        models: indices of the models that are in it.
        factors: each model's Gram, by its index.
        lambdas: each model's, by its index.
        inverse: of the sum and the ridge.
    """

    models: Sequence[int]
    factors: Sequence[Tensor]
    lambdas: Sequence[float]
    offdiagonal: float
    inverse: Inverse
    dtype: torch.dtype = torch.float64

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """Return some rows of the matrices, and the next: each row has an equation of its own."""
        *_, height, _ = tensor.shape
        step = max(1, ELEMENTS * height // max(1, tensor.numel()))
        parts: Sequence[Tensor] = tensor.split(step, dim=-2)
        return parts

    def equations(self, result: Tensor, dtype: torch.dtype) -> Iterator[Rows]:
        """Yield one for some rows, then for the next."""
        for _ in self.split(result):
            yield Rows(self)


class Rows:
    """The equations of some rows."""

    starts_at_mean = True

    def __init__(self, system: OneSided):
        self._system = system
        self._right: Tensor | None = None

    def add(self, index: int, theta: Tensor, reference: Tensor) -> None:
        """Add λᵢ (θᵢ − ρ) Aᵢ of one model to the right side."""
        system = self._system
        difference = (theta - reference).mT
        product = times(system.factors[index], difference, system.offdiagonal)
        product.mul_(system.lambdas[index])
        self._right = product if self._right is None else self._right.add_(product)

    def solve(self, reference: Tensor, out: Tensor, name: str = "") -> None:
        """Write ρ plus the right side times (Σ λᵢ Aᵢ)⁻¹, zero in directions that nobody saw."""
        assert self._right is not None
        torch.add(reference, self._system.inverse.times(self._right).mT, out=out)


def common(
    inputs: Sequence[Tensor],
    lambdas: Sequence[float],
    *,
    offdiagonal: float = OFFDIAGONAL,
    ridge: float = 0.0,
) -> Inverse:
    """Return the inverse of Σ λᵢ Aᵢ + ridge · tr/i · I: one for all layers that share their inputs.

    Args:
        inputs: n Grams.
        lambdas, offdiagonal, ridge: as for `system`.
    """
    lambdas = relative(lambdas)
    models = counting(lambdas)
    present = [as_factor(inputs[i]) for i in models]
    total = weighted_sum(present, [lambdas[i] for i in models], offdiagonal)
    size = total.squeeze(-1) if is_diagonal(total) else total.diagonal(dim1=-2, dim2=-1)
    size += ridge * size.mean(-1, keepdim=True)
    # The diagonal stays whole while the rest shrinks, and with it every eigenvalue is at least
    # this, relative to the diagonal.
    least = max(1 - offdiagonal, ridge / (ridge + size.shape[-1]))
    return invert(total, noise(present), least=least)


def system(
    precisions: Sequence[tuple[Tensor, ...]],
    lambdas: Sequence[float],
    *,
    offdiagonal: float = OFFDIAGONAL,
    ridge: float = 0.0,
    shared: Inverse | None = None,
) -> OneSided:
    """Return Σ λᵢ Aᵢ + ridge · tr/i · I, factorised.

    Args:
        precisions: n times one Gram, a factor as `kronecker.py` has it.
        lambdas: n non-negative numbers, not all zero. A model with lambda 0 is not there.
        offdiagonal: 0 to 1, what the off-diagonals are multiplied by.
        ridge: relative to the mean of the diagonal of Σ λᵢ Aᵢ.
        shared: what `common` gives for these inputs, if it is there already.
    """
    factors = [as_factor(a) for (a,) in precisions]
    if shared is None:
        shared = common(factors, lambdas, offdiagonal=offdiagonal, ridge=ridge)
    lambdas = relative(lambdas)
    return OneSided(counting(lambdas), factors, lambdas, offdiagonal, shared)
