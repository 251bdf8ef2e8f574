"""`token`: every position's own gradient is squared, Σ_t (∂ℓ_t/∂θ)².

One backward pass estimates it without bias: with independent signs ε_t, E_ε (Σ_t ε_t g_t)² =
Σ_t g_t², because the cross terms E[ε_s ε_t] g_s g_t vanish (Hutchinson 1989). The signs depend on
the seed, the example and the position alone.
"""

from __future__ import annotations

from torch import Tensor

from fisher_mergekit.measure.batches import Batch
from fisher_mergekit.measure.likelihoods.draws import signs


def weigh(start: Tensor, batch: Batch, seed: int) -> Tensor:
    """Multiply each position's score, `start` `[b, n, v]`, with its sign, in place."""
    epsilon = signs(seed, batch.numbers, start.shape[1])
    return start.mul_(epsilon[:, :, None].to(start.device, start.dtype))
