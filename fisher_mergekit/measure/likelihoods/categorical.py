"""A classifier: y is one of C classes, p(y|x) = softmax(logits), logits `[b, c]`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fisher_mergekit.errors import MeasureError
from fisher_mergekit.measure.batches import Batch
from fisher_mergekit.measure.likelihoods.base import Likelihood
from fisher_mergekit.measure.likelihoods.draws import inverse_cdf, uniforms


class Categorical(Likelihood):
    """Single-label sequence classification."""

    name = "categorical"
    heads = ("ForSequenceClassification",)
    default_estimator = "exact"
    needs_label = True

    def check(self, config: Any, estimator: str) -> None:
        kind = getattr(config, "problem_type", None)
        if config.num_labels < 2 or kind not in (None, "single_label_classification"):
            raise MeasureError(
                f"this classifier has {config.num_labels} label(s) and problem_type {kind!r}; so "
                "far only single-label classification with two or more classes can be measured."
            )

    def target(
        self, inputs: dict[str, Tensor], prompt: int, label: int | None
    ) -> tuple[Tensor | None, Tensor | None]:
        return None, None if label is None else torch.tensor(label)

    def score(self, logits: Tensor, batch: Batch, outcome: Tensor) -> Tensor:
        score = logits.double().softmax(-1).neg_()
        return score.scatter_add_(1, outcome[:, None], torch.ones_like(score[:, :1]))

    def sample(self, logits: Tensor, batch: Batch, seed: int) -> Tensor:
        uniform = uniforms(seed, batch.numbers, 1)[:, 0]
        return inverse_cdf(logits.double().softmax(-1), uniform)

    def factor(self, logits: Tensor, batch: Batch) -> Iterator[Tensor]:
        """Yield the C − 1 columns of the Cholesky factor of diag(p) − ppᵀ.

        A categorical draw is a chain of at most C − 1 binary ones: is it class k, given that it is
        none before k? Decision k happens and is a coin flip with standard deviation
        s_k = √(p_k q_k / q_{k−1}), q_k = Σ_{j>k} p_j, and moves the score along
        e_k − E[e_y | y > k] (Tanabe & Sagae 1992). Tail sums, unlike 1 − Σ_{j≤k} p_j, keep their
        precision when a model is sure.
        """
        p = logits.double().softmax(-1)  # [b, c] is small; sure models need the digits
        tail = p.flip(-1).cumsum(-1).flip(-1)  # tail[:, k] = q_{k-1} = Σ_{j>=k} p_j
        tiny = torch.finfo(p.dtype).tiny
        for k in range(p.shape[1] - 1):
            q, before = tail[:, k + 1], tail[:, k].clamp_min(tiny)
            deviation = (p[:, k] * (q / before)).sqrt()
            column = torch.zeros_like(p)
            column[:, k] = 1.0
            column[:, k + 1 :] = -p[:, k + 1 :] / q.clamp_min(tiny)[:, None]
            yield column * deviation[:, None]
