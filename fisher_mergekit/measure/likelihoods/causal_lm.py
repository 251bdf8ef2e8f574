"""A causal LM: log p(x) = Σ_t log p(x_t | x_<t) over the second to the last token.

Logits are `[b, t, v]`; position t predicts token t + 1. Padding, and the prompt if it is masked, is
not scored. An outcome is one token a position, `[b, t − 1]`. Drawing each from the model given the
true prefix makes the cross terms between positions vanish in expectation: the squared sequence
gradient of a sampled outcome is then an unbiased estimate of the sum of token-level Fishers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fisher_mergekit.errors import MeasureError
from fisher_mergekit.measure.batches import Batch
from fisher_mergekit.measure.likelihoods.base import Likelihood
from fisher_mergekit.measure.likelihoods.draws import inverse_cdf, uniforms

CHUNK = 256
"""Rows of `[b t, v]` that are held in float32 at once."""


class CausalLM(Likelihood):
    """Next-token prediction."""

    name = "causal_lm"
    heads = ("ForCausalLM", "LMHeadModel")
    default_estimator = "sampled"
    needs_label = False

    def check(self, config: Any, estimator: str) -> None:
        if estimator == "exact":
            raise MeasureError(
                "the exact estimator would need one backward pass for each of the "
                f"{config.vocab_size:,} tokens of the vocabulary. Use `estimator: sampled`, which "
                "is unbiased and needs one."
            )

    def score(self, logits: Tensor, batch: Batch, outcome: Tensor) -> Tensor:
        scored = batch.scored[:, 1:]
        score = torch.zeros_like(logits)
        # Only scored rows, and few at once: no second [b, t, v] in float32.
        examples, positions = scored.nonzero(as_tuple=True)
        for start in range(0, len(examples), CHUNK):
            at = examples[start : start + CHUNK], positions[start : start + CHUNK]
            chunk = logits[at].float().softmax(-1).neg_()
            chunk.scatter_add_(1, outcome[at][:, None], torch.ones_like(chunk[:, :1]))
            score[at] = chunk.to(score.dtype)
        return score

    def sample(self, logits: Tensor, batch: Batch, seed: int) -> Tensor:
        length = logits.shape[1] - 1
        uniform = uniforms(seed, batch.examples, length)
        outcome = torch.zeros(len(logits), length, dtype=torch.long, device=logits.device)
        for example in range(len(logits)):
            for start in range(0, length, CHUNK):
                rows = slice(start, min(start + CHUNK, length))
                p = logits[example, rows].float().softmax(-1)
                outcome[example, rows] = inverse_cdf(p, uniform[example, rows])
        return outcome

    def observed(self, batch: Batch) -> Tensor:
        return batch.inputs["input_ids"][:, 1:]

    def factor(self, logits: Tensor, batch: Batch) -> Iterator[Tensor]:
        raise NotImplementedError("`check` refuses the exact estimator")
