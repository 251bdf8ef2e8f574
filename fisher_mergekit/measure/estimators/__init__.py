"""One file an estimator: where y comes from.

An estimator turns one batch's logits into *starts*: tensors shaped like the logits from which a
backward pass starts. The Fisher is the mean over examples of Σ_starts (per-example gradient)².
To add one, write a file here that defines `starts`; its name is the estimator's.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pkgutil import iter_modules
from typing import Protocol

from torch import Tensor

from fisher_mergekit.measure.batches import Batch
from fisher_mergekit.measure.likelihoods.base import Likelihood


class Estimator(Protocol):
    """What a file here defines."""

    def starts(
        self, likelihood: Likelihood, logits: Tensor, batch: Batch, seed: int
    ) -> Iterator[Tensor]:
        """Yield the starts of one batch, each shaped like the logits."""
        ...


ESTIMATORS = tuple(module.name for module in iter_modules(__path__))


def estimator_for(name: str) -> Estimator:
    """Return the estimator of that name."""
    return import_module(f"{__name__}.{name}")
