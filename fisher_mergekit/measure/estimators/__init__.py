"""One file an estimator: where y comes from.

An estimator turns one batch's logits into *starts*: tensors shaped like the logits from which a
backward pass starts. The Fisher is the mean over examples of Σ_starts (per-example gradient)².
To add one, write a file here that defines `starts` and `check`; its name is the estimator's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any, Protocol

from torch import Tensor

from fisher_mergekit.measure.batches import Batch, Example
from fisher_mergekit.measure.likelihoods.base import Likelihood
from fisher_mergekit.recipe import Calibration


class Estimator(Protocol):
    """What a file here defines."""

    def check(
        self,
        likelihood: Likelihood,
        config: Any,
        examples: Sequence[Example],
        calibration: Calibration,
    ) -> None:
        """Raise MeasureError or CalibrationError if these examples cannot be measured so."""
        ...

    def starts(
        self, likelihood: Likelihood, logits: Tensor, batch: Batch, seed: int
    ) -> Iterator[Tensor]:
        """Yield the starts of one batch, each shaped like the logits."""
        ...


def estimator_for(name: str) -> Estimator:
    """Return the estimator of that name."""
    return import_module(f"{__name__}.{name}")
