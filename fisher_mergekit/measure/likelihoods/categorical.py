"""A classifier: y is one of C classes, p(y|x) = softmax(logits), logits `[b, c]`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fisher_mergekit.measure.batches import Batch, Example
from fisher_mergekit.measure.calibration import Row
from fisher_mergekit.measure.encoding import Encoded, Encoder
from fisher_mergekit.measure.labels import class_index
from fisher_mergekit.measure.likelihoods.base import Likelihood
from fisher_mergekit.measure.likelihoods.classifiers import HEADS, SINGLE_LABEL, Classifier
from fisher_mergekit.measure.likelihoods.draws import inverse_cdf, uniforms
from fisher_mergekit.measure.likelihoods.softmax import covariance_columns, softmax_score


class OneOf(Likelihood):
    """One of the columns of `[b, c]` logits, whatever they stand for."""

    default_estimator = "exact"

    def score(self, logits: Tensor, batch: Batch, outcome: Tensor) -> Tensor:
        return softmax_score(logits.double(), outcome)

    def sample(self, logits: Tensor, batch: Batch, seed: int) -> Tensor:
        uniform = uniforms(seed, batch.numbers, 1)[:, 0]
        return inverse_cdf(logits.double().softmax(-1), uniform)

    def factor(self, logits: Tensor, batch: Batch) -> Iterator[Tensor]:
        """Yield C − 1 columns, as a categorical has no more than C − 1 degrees of freedom."""
        yield from covariance_columns(logits)


class Categorical(OneOf, Classifier):
    """Single-label classification."""

    name = "categorical"
    heads = HEADS
    problem = SINGLE_LABEL

    def passes(self, config: Any, examples: Sequence[Example]) -> int:
        return int(config.num_labels) - 1

    def encode(self, row: Row, encoder: Encoder) -> Encoded:
        inputs = encoder.read(row).inputs
        if row.label is None:
            return inputs, None, None
        return inputs, None, torch.tensor(class_index(row.label, encoder.config))
