"""fisher_mergekit's precompute: one batch of it, after the rules have been verified."""

from __future__ import annotations

from typing import ClassVar

import torch
from cases import Case
from torch import Tensor
from ways.base import Way

from fisher_mergekit.measure.estimators import estimator_for
from fisher_mergekit.measure.likelihoods import likelihood_for
from fisher_mergekit.measure.session import Session


class Empirical(Way):
    """The labels' gradients, as the peers measure them."""

    title = "empirical"

    def __init__(self, case: Case):
        super().__init__(case)
        model = case.copy()
        likelihood = likelihood_for(type(model).__name__, model.config)
        self._session = Session(
            model=model,
            likelihood=likelihood,
            estimator=estimator_for(self.estimator(likelihood.default_estimator)),
            seed=0,
            pad_token_id=0,
            device=torch.device("cpu"),
        )
        self._session.verify(case.examples)

    def estimator(self, default: str) -> str:
        """Return the estimator's name."""
        return "empirical"

    def run(self) -> None:
        self._session._add_batch(self.case.batch)

    def squares(self) -> dict[str, Tensor]:
        totals = self._session._taps.totals
        return {name: totals[p] for name, p in self._session.model.named_parameters()}

    def notes(self) -> list[str]:
        slow = {"whose module runs again": self._session.again, "by the loop": self._session.loose}
        return [f"{len(names)} tensors {how}" for how, names in slow.items() if names]


class Fisher(Empirical):
    """The head's default estimator: exact for a classifier, sampled for a language model."""

    title: ClassVar[str] = "Fisher"
    is_peer = False

    def estimator(self, default: str) -> str:
        return default
