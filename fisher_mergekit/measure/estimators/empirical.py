"""`empirical`: y is the data's label. Not the Fisher, but what many call by its name."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from fisher_mergekit.measure.batches import Batch
from fisher_mergekit.measure.likelihoods.base import Likelihood


def starts(likelihood: Likelihood, logits: Tensor, batch: Batch, seed: int) -> Iterator[Tensor]:
    """Yield the score of the observed outcome."""
    yield likelihood.score(logits, batch, likelihood.observed(batch))
