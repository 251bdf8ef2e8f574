"""`sampled`: one y an example, drawn from the model. Unbiased, one backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from fisher_mergekit.measure.batches import Batch, Example
from fisher_mergekit.measure.likelihoods.base import Likelihood
from fisher_mergekit.recipe import Calibration


def check(
    likelihood: Likelihood, config: Any, examples: Sequence[Example], calibration: Calibration
) -> None:
    """Any likelihood can be drawn from."""


def starts(likelihood: Likelihood, logits: Tensor, batch: Batch, seed: int) -> Iterator[Tensor]:
    """Yield the score of one drawn outcome."""
    yield likelihood.sampled_score(logits, batch, seed)
