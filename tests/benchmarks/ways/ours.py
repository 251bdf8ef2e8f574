"""fisher_mergekit's precompute: one batch of it, after the rules have been verified."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from cases import Case
from fisher_mergekit.measure.estimators import estimator_for
from fisher_mergekit.measure.likelihoods import likelihood_for
from fisher_mergekit.measure.session import Session
from ways.base import Way


def session_for(case: Case, estimator: str | None) -> Session:
    """Return a session for a copy of the model; None is the head's default estimator."""
    model = case.copy()
    likelihood = likelihood_for(type(model).__name__, model.config)
    return Session(
        model=model,
        likelihood=likelihood,
        estimator=estimator_for(estimator or likelihood.default_estimator),
        seed=0,
        pad_token_id=0,
        device=torch.device("cpu"),
    )


class Empirical(Way):
    """The labels' gradients, as the peers measure them."""

    title = "empirical"
    estimator: ClassVar[str | None] = "empirical"

    def __init__(self, case: Case):
        super().__init__(case)
        self._session = session_for(case, self.estimator)
        self._session.verify(case.examples)

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
    takes_labels = False
    estimator = None
