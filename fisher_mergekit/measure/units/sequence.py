"""`sequence`: the gradient of an example's whole log-likelihood is squared, (Σ_t ∂ℓ_t/∂θ)²."""

from __future__ import annotations

from torch import Tensor

from fisher_mergekit.measure.batches import Batch


def weigh(start: Tensor, batch: Batch, seed: int) -> Tensor:
    """Return the start as it is: a backward pass sums over positions before anything is squared."""
    return start
