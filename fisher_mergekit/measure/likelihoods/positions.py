"""A categorical at every scored position: logits `[b, n, v]`, outcomes `[b, n]`.

log p(y|x) = Σ_t log softmax(logits_t)[y_t] over the scored positions t. Language models, masked
ones too, and token classifiers differ only in which positions are scored and what is observed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fisher_mergekit.measure.batches import Batch
from fisher_mergekit.measure.likelihoods.base import Likelihood
from fisher_mergekit.measure.likelihoods.draws import inverse_cdf, uniforms

CHUNK = 256
"""Rows of `[b n, v]` that are held in float32 at once."""


class CategoricalPositions(Likelihood):
    """A class, or a token of a vocabulary, at each position."""

    def score(self, logits: Tensor, batch: Batch, outcome: Tensor) -> Tensor:
        assert batch.scored is not None
        score = torch.zeros_like(logits)
        # Only scored rows, and few at once: no second [b, n, v] in float32.
        examples, positions = batch.scored.nonzero(as_tuple=True)
        for start in range(0, len(examples), CHUNK):
            at = examples[start : start + CHUNK], positions[start : start + CHUNK]
            rows = logits[at]
            # Half precision is not enough for a softmax; double is kept.
            chunk = rows.to(torch.promote_types(rows.dtype, torch.float32)).softmax(-1).neg_()
            chunk.scatter_add_(1, outcome[at][:, None], torch.ones_like(chunk[:, :1]))
            score[at] = chunk.to(score.dtype)
        return score

    def sample(self, logits: Tensor, batch: Batch, seed: int) -> Tensor:
        assert batch.scored is not None
        length = batch.scored.shape[1]
        # A number for each position, scored or not: what is drawn at one hangs on no other.
        uniform = uniforms(seed, batch.numbers, length).to(logits.device)
        outcome = torch.zeros(len(logits), length, dtype=torch.long, device=logits.device)
        examples, positions = batch.scored.nonzero(as_tuple=True)
        for start in range(0, len(examples), CHUNK):
            at = examples[start : start + CHUNK], positions[start : start + CHUNK]
            rows = logits[at]
            p = rows.to(torch.promote_types(rows.dtype, torch.float32)).softmax(-1)
            outcome[at] = inverse_cdf(p, uniform[at])
        return outcome
