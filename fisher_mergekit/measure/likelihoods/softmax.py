"""A categorical distribution p = softmax(logits), `[…, c]`: scores, and a factor of its covariance.

A softmax needs more digits than half precision has, and rows of logits that are minus infinity are
classes that are impossible.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def probabilities(logits: Tensor) -> Tensor:
    """Return softmax(logits), float32 or better."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)


def softmax_score(logits: Tensor, outcome: Tensor) -> Tensor:
    """Return ∂ log softmax(logits)[outcome] / ∂ logits, float32 or better.

    Args:
        logits: `[…, c]`.
        outcome: `[…]` class indices.
    """
    return score_(probabilities(logits), outcome)


def score_(p: Tensor, outcome: Tensor) -> Tensor:
    """Make probabilities `[…, c]` the score e_outcome − p, in place."""
    return p.neg_().scatter_add_(-1, outcome[..., None], torch.ones_like(p[..., :1]))


def covariance_columns(logits: Tensor) -> Iterator[Tensor]:
    """Yield the c − 1 columns `[…, c]` of the Cholesky factor of diag(p) − ppᵀ.

    A categorical draw is a chain of at most c − 1 binary ones: is it class k, given that it is
    none before k? Decision k happens and is a coin flip with standard deviation
    s_k = √(p_k q_k / q_{k−1}), q_k = Σ_{j>k} p_j, and moves the score along
    e_k − E[e_y | y > k] (Tanabe & Sagae 1992). Tail sums, unlike 1 − Σ_{j≤k} p_j, keep their
    precision when a model is sure.
    """
    p = logits.double().softmax(-1)  # few rows at once; sure models need the digits
    tail = p.flip(-1).cumsum(-1).flip(-1)  # tail[…, k] = q_{k-1} = Σ_{j>=k} p_j
    tiny = torch.finfo(p.dtype).tiny
    for k in range(p.shape[-1] - 1):
        q, before = tail[..., k + 1], tail[..., k].clamp_min(tiny)
        deviation = (p[..., k] * (q / before)).sqrt()
        column = torch.zeros_like(p)
        column[..., k] = 1.0
        column[..., k + 1 :] = -p[..., k + 1 :] / q.clamp_min(tiny)[..., None]
        yield column * deviation[..., None]
