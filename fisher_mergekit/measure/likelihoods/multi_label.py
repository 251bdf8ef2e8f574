"""Multi-label classification: each of C classes is there or not, by itself, logits `[b, c]`.

p(y_c = 1 | x) = σ(logit_c), independently, so that the score's covariance is diag(p (1 − p)): the
exact Fisher takes C passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fisher_mergekit.measure.batches import Batch, Example
from fisher_mergekit.measure.calibration import Row
from fisher_mergekit.measure.encoding import Encoded, Encoder
from fisher_mergekit.measure.labels import zeros_and_ones
from fisher_mergekit.measure.likelihoods.classifiers import HEADS, Classifier
from fisher_mergekit.measure.likelihoods.draws import uniforms


class MultiLabel(Classifier):
    """A coin for each class."""

    name = "multi_label"
    heads = HEADS
    problem = "multi_label_classification"
    default_estimator = "exact"

    def passes(self, config: Any, examples: Sequence[Example]) -> int:
        return int(config.num_labels)

    def encode(self, row: Row, encoder: Encoder) -> Encoded:
        inputs = encoder.read(row).inputs
        if row.label is None:
            return inputs, None, None
        return inputs, None, torch.tensor(zeros_and_ones(row.label, encoder.config))

    def score(self, logits: Tensor, batch: Batch, outcome: Tensor) -> Tensor:
        # y − σ(z) as σ(−z) where y is one: a sure model's 1 − σ(z) would lose its digits.
        z = logits.double()
        return torch.where(outcome > 0.5, (-z).sigmoid(), -z.sigmoid())

    def sample(self, logits: Tensor, batch: Batch, seed: int) -> Tensor:
        uniform = uniforms(seed, batch.numbers, logits.shape[1]).to(logits.device)
        return (uniform < logits.double().sigmoid()).double()

    def factor(self, logits: Tensor, batch: Batch) -> Iterator[Tensor]:
        """Yield the standard deviation √(p (1 − p)) of each class."""
        z = logits.double()
        deviation = (z.sigmoid() * (-z).sigmoid()).sqrt()
        for k in range(logits.shape[1]):
            column = torch.zeros_like(deviation)
            column[:, k] = deviation[:, k]
            yield column
