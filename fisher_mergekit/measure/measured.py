"""What was measured of a model, before it is written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fisher_mergekit.measure.factors import Factors
from fisher_mergekit.measure.subject import Subject
from fisher_mergekit.precision import kind_for
from fisher_mergekit.precision.statistics import INPUTS
from fisher_mergekit.sidecar.header import Settings


@dataclass
class Measured:
    """What was measured of a model.

    Attributes:
        subject: the model and its files.
        squares: of each parameter, the mean over examples; empty if not asked for.
        factors: sums over the examples; None if not asked for.
        settings: how it was measured.
        origin: what else is recorded of the data.
        later: which statistics kinds still need that are written after this one.
    """

    subject: Subject
    squares: dict[nn.Parameter, Tensor]
    factors: Factors | None
    settings: Settings
    origin: dict[str, Any]
    later: frozenset[str] = frozenset()

    @property
    def examples(self) -> int:
        """How many examples the sums are over."""
        return self.settings.examples or 1


def needs_of(kinds: Iterable[str]) -> frozenset[str]:
    """Return the statistics that have to be measured for some kinds."""
    return frozenset[str]().union(*(kind_for(kind).STATISTICS.names for kind in kinds))


def need_gradients(kinds: Iterable[str]) -> bool:
    """Return whether any of the kinds asks for y, so that an estimator matters."""
    return bool(needs_of(kinds) - {INPUTS})
