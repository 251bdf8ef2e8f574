"""`exact`: the expectation over all outcomes; over C classes it takes C − 1 backward passes.

E_{y~p(y|x)} (∂ log p / ∂θ)² = Σ_y p_y (Jᵀ s_y)², and that equals Σ_k (Jᵀ l_k)² elementwise for any
L with LLᵀ = Σ_y p_y s_y s_yᵀ. The likelihood's factor has one column fewer than it has classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from fisher_mergekit.errors import MeasureError
from fisher_mergekit.measure.batches import Batch, Example
from fisher_mergekit.measure.likelihoods.base import Likelihood
from fisher_mergekit.recipe import Calibration

MAX_PASSES = 512
"""Backward passes a batch above which a drawn outcome, which is unbiased, is the better bargain."""


def check(
    likelihood: Likelihood, config: Any, examples: Sequence[Example], calibration: Calibration
) -> None:
    """Raise MeasureError if the expectation takes too many backward passes."""
    passes = likelihood.passes(config, examples)
    if passes > MAX_PASSES:
        raise MeasureError(
            f"the exact estimator would need {passes:,} backward passes for each batch, and more "
            f"than {MAX_PASSES} are refused. Use `estimator: sampled`, which is unbiased and needs "
            "one."
        )


def starts(likelihood: Likelihood, logits: Tensor, batch: Batch, seed: int) -> Iterator[Tensor]:
    """Yield the columns of the likelihood's factor."""
    yield from likelihood.factor(logits, batch)
