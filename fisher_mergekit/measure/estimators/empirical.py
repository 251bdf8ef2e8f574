"""`empirical`: y is the data's label. Not the Fisher, but what many call by its name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from fisher_mergekit.errors import CalibrationError
from fisher_mergekit.measure.batches import Batch, Example
from fisher_mergekit.measure.likelihoods.base import Likelihood
from fisher_mergekit.recipe import Calibration


def check(
    likelihood: Likelihood, config: Any, examples: Sequence[Example], calibration: Calibration
) -> None:
    """Raise CalibrationError if an example has no label."""
    unlabelled = [example.number for example in examples if example.outcome is None]
    if unlabelled and likelihood.needs_label:
        remedy = (
            "Name the column: `label: COLUMN` (--label)."
            if calibration.label is None
            else f"Fill its column {calibration.label!r}, or leave out such rows."
        )
        raise CalibrationError(
            f"the empirical estimator needs labels, and example {unlabelled[0]} has none. {remedy}"
        )


def starts(likelihood: Likelihood, logits: Tensor, batch: Batch, seed: int) -> Iterator[Tensor]:
    """Yield the score of the observed outcome."""
    yield likelihood.score(logits, batch, likelihood.observed(batch))
