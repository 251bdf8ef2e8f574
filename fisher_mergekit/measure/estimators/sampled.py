"""`sampled`: one y an example, drawn from the model. Unbiased, one backward pass."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from fisher_mergekit.measure.batches import Batch
from fisher_mergekit.measure.likelihoods.base import Likelihood


def starts(likelihood: Likelihood, logits: Tensor, batch: Batch, seed: int) -> Iterator[Tensor]:
    """Yield the score of one drawn outcome."""
    yield likelihood.score(logits, batch, likelihood.sample(logits, batch, seed))
