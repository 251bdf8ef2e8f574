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
from fisher_mergekit.measure.likelihoods.softmax import (
    covariance_columns,
    probabilities,
    score_,
    softmax_score,
)

CHUNK_ELEMENTS = 4 * 1024 * 1024
"""Elements of `[b n, v]` that are held in float32 at once: 16 MiB, which the C library keeps for
the next chunk, where it gives 32 MiB back to the system."""


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
        for at in _chunks(batch, logits):
            score[at] = softmax_score(logits[at], outcome[at]).to(score.dtype)
        return score

    def sample(self, logits: Tensor, batch: Batch, seed: int) -> Tensor:
        uniform = _uniforms(logits, batch, seed)
        outcome = torch.zeros(uniform.shape, dtype=torch.long, device=logits.device)
        for at in _chunks(batch, logits):
            outcome[at] = inverse_cdf(probabilities(logits[at]), uniform[at])
        return outcome

    def sampled_score(self, logits: Tensor, batch: Batch, seed: int) -> Tensor:
        uniform = _uniforms(logits, batch, seed)
        score = torch.zeros_like(logits)
        for at in _chunks(batch, logits):
            p = probabilities(logits[at])  # of a whole vocabulary: once for the draw and the score
            score[at] = score_(p, inverse_cdf(p, uniform[at])).to(score.dtype)
        return score

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


def _uniforms(logits: Tensor, batch: Batch, seed: int) -> Tensor:
    """Return a number for each position, scored or not: a draw at one hangs on no other."""
    return uniforms(seed, batch.numbers, logits.shape[1]).to(logits.device)


def _chunks(batch: Batch, logits: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the (example, position) of all scored rows, some at a time."""
    assert batch.scored is not None
    examples, positions = batch.scored.nonzero(as_tuple=True)
    count = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    for start in range(0, len(examples), count):
        yield examples[start : start + count], positions[start : start + count]
