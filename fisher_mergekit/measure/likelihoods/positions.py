"""A categorical at every scored position: logits `[b, n, v]`, outcomes `[b, n]`.

log p(y|x) = Σ_t log softmax(logits_t)[y_t] over the scored positions t. Language models, masked
ones too, and token classifiers differ only in which positions are scored and what is observed.

Given x the positions are independent (a language model's given the true tokens before them), so
the cross terms between positions vanish in expectation over y: `exact` and `sampled` measure, in
expectation, the sum of the positions' own Fishers, whichever unit is squared whole.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fisher_mergekit.measure.batches import Batch, Example
from fisher_mergekit.measure.likelihoods.base import Likelihood
from fisher_mergekit.measure.likelihoods.draws import inverse_cdf, uniforms
from fisher_mergekit.measure.likelihoods.softmax import covariance_columns, softmax_score

CHUNK = 256
"""Rows of `[b n, v]` that are held in float32 at once."""


class CategoricalPositions(Likelihood):
    """A class, or a token of a vocabulary, at each position."""

    default_estimator = "sampled"
    has_positions = True

    @abstractmethod
    def classes(self, config: Any) -> int:
        """Return how many classes there are at a position."""

    def passes(self, config: Any, examples: Sequence[Example]) -> int:
        positions = max(int(e.scored.sum()) for e in examples if e.scored is not None)
        return positions * (self.classes(config) - 1)

    def score(self, logits: Tensor, batch: Batch, outcome: Tensor) -> Tensor:
        score = torch.zeros_like(logits)
        # Only scored rows, and few at once: no second [b, n, v] in float32.
        for at in _chunks(batch):
            score[at] = softmax_score(logits[at], outcome[at]).to(score.dtype)
        return score

    def sample(self, logits: Tensor, batch: Batch, seed: int) -> Tensor:
        length = logits.shape[1]
        # A number for each position, scored or not: what is drawn at one hangs on no other.
        uniform = uniforms(seed, batch.numbers, length).to(logits.device)
        outcome = torch.zeros(len(logits), length, dtype=torch.long, device=logits.device)
        for at in _chunks(batch):
            rows = logits[at]
            p = rows.to(torch.promote_types(rows.dtype, torch.float32)).softmax(-1)
            outcome[at] = inverse_cdf(p, uniform[at])
        return outcome

    def factor(self, logits: Tensor, batch: Batch) -> Iterator[Tensor]:
        """Yield v − 1 columns for the first scored position of every example, the second, …."""
        assert batch.scored is not None
        order = batch.scored.cumsum(1)
        for number in range(1, int(order.max()) + 1):
            at = (batch.scored & (order == number)).nonzero(as_tuple=True)
            for column in covariance_columns(logits[at]):
                start = torch.zeros_like(logits)
                start[at] = column.to(start.dtype)
                yield start


def _chunks(batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the (example, position) of all scored rows, some at a time."""
    assert batch.scored is not None
    examples, positions = batch.scored.nonzero(as_tuple=True)
    for start in range(0, len(examples), CHUNK):
        yield examples[start : start + CHUNK], positions[start : start + CHUNK]
