"""fisher_mergekit's precompute: one batch of it, after the rules have been verified."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

import torch
from torch import Tensor

from cases import Case
from fisher_mergekit.measure.estimators import estimator_for
from fisher_mergekit.measure.factors import Factors
from fisher_mergekit.measure.likelihoods import likelihood_for
from fisher_mergekit.measure.measured import needs_of
from fisher_mergekit.measure.session import Session
from fisher_mergekit.precision.statistics import INPUTS, OUTPUTS, SQUARES
from ways.base import Way, names


def session_for(case: Case, estimator: str | None, kinds: Collection[str] = ("fisher",)) -> Session:
    """Return a session for a copy of the model; None is the head's default estimator."""
    model, needs = case.copy(), needs_of(kinds)
    likelihood = likelihood_for(type(model).__name__, model.config)
    return Session(
        model=model,
        likelihood=likelihood,
        estimator=estimator_for(estimator or likelihood.default_estimator),
        seed=0,
        pad_token_id=0,
        device=torch.device("cpu"),
        parameters=None if SQUARES in needs else (),
        factors=Factors(names(model), outputs=OUTPUTS in needs) if INPUTS in needs else None,
    )


class Empirical(Way):
    """The labels' gradients, as the peers measure them."""

    title = "empirical"
    estimator: ClassVar[str | None] = "empirical"
    kinds: ClassVar[Collection[str]] = ("fisher",)

    def __init__(self, case: Case):
        super().__init__(case)
        self._session = session_for(case, self.estimator, self.kinds)
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


class Gram(Fisher):
    """The inputs of linear layers; forward only."""

    title = "gram"
    kinds = ("gram",)


class KFAC(Fisher):
    """Their inputs and output gradients."""

    title = "kfac"
    kinds = ("kfac",)


class Together(Fisher):
    """All kinds in one pass."""

    title = "all three"
    kinds = ("fisher", "gram", "kfac")
