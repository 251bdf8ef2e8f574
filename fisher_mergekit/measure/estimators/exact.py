"""`exact`: the expectation over all classes, in C − 1 backward passes.

E_{y~p(y|x)} (∂ log p / ∂θ)² = Σ_y p_y (Jᵀ s_y)², and that equals Σ_k (Jᵀ l_k)² elementwise for any
L with LLᵀ = Σ_y p_y s_y s_yᵀ. The likelihood's factor has one column fewer than it has classes.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from fisher_mergekit.measure.batches import Batch
from fisher_mergekit.measure.likelihoods.base import Likelihood


def starts(likelihood: Likelihood, logits: Tensor, batch: Batch, seed: int) -> Iterator[Tensor]:
    """Yield the columns of the likelihood's factor."""
    yield from likelihood.factor(logits, batch)
