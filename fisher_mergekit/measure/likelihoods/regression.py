"""Regression: y is k numbers, each Gaussian around its output with variance one, logits `[b, k]`.

log p(y|x) = −½ ‖y − f(x)‖² + const is the squared loss that these heads are trained with. The score
is y − f, and its covariance the identity: the exact Fisher is the sum of the squared gradients of
the outputs and asks for no data's labels. It has the unit of the labels in it: a model of hundreds
of points is surer than one of fractions, and `normalize_fishers` takes that out again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fisher_mergekit.measure.batches import Batch, Example
from fisher_mergekit.measure.calibration import Row
from fisher_mergekit.measure.encoding import Encoded, Encoder
from fisher_mergekit.measure.labels import numbers
from fisher_mergekit.measure.likelihoods.classifiers import HEADS, Classifier
from fisher_mergekit.measure.likelihoods.draws import normals


class Regression(Classifier):
    """A Gaussian of unit variance around each output."""

    name = "regression"
    heads = HEADS
    problem = "regression"
    default_estimator = "exact"

    def passes(self, config: Any, examples: Sequence[Example]) -> int:
        return int(config.num_labels)

    def encode(self, row: Row, encoder: Encoder) -> Encoded:
        inputs = encoder.read(row).inputs
        if row.label is None:
            return inputs, None, None
        return inputs, None, torch.tensor(numbers(row.label, encoder.config.num_labels))

    def score(self, logits: Tensor, batch: Batch, outcome: Tensor) -> Tensor:
        return outcome.double() - logits.double()

    def sample(self, logits: Tensor, batch: Batch, seed: int) -> Tensor:
        noise = normals(seed, batch.numbers, logits.shape[1])
        return logits.double() + noise.to(logits.device)

    def factor(self, logits: Tensor, batch: Batch) -> Iterator[Tensor]:
        """Yield the k columns of the identity."""
        for k in range(logits.shape[1]):
            column = torch.zeros_like(logits)
            column[:, k] = 1.0
            yield column
