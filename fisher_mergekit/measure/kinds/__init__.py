"""One file a kind: what has to be measured for it, and what of that its sidecar holds.

To add one, write a file here that defines `NEEDS` and `stored`; its name is the kind's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

from torch import Tensor, nn

from fisher_mergekit.measure.factors import Factors
from fisher_mergekit.measure.subject import Subject
from fisher_mergekit.sidecar.header import Factors as FactorNames
from fisher_mergekit.sidecar.header import Settings

SQUARES, INPUTS, OUTPUTS = "squares", "inputs", "outputs"
"""What a pass over the data can measure: squared gradients, and the factors of linear layers."""


@dataclass
class Measured:
    """What was measured of a model.

    Attributes:
        subject: the model and its files.
        squares: of each parameter, the mean over examples; empty if not asked for.
        factors: sums over the examples; None if not asked for.
        settings: how it was measured.
        origin: what else is recorded of the data.
        later: what of it kinds still need that are written after this one.
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


@dataclass
class Stored:
    """What a sidecar holds of one kind.

    Attributes:
        tensors: by the names under which they are stored, on the CPU.
        matrices: names of those that are symmetric matrices.
        weights: the weights in the files that they describe.
        factors: by weight, which tensors are its factors; empty for a tensor a weight.
        undescribed: other weights in the files, and why nothing is stored of them.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    matrices: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    factors: dict[str, FactorNames] = field(default_factory=dict)
    undescribed: dict[str, str] = field(default_factory=dict)


class Kind(Protocol):
    """What a file here defines."""

    NEEDS: frozenset[str]

    def stored(self, measured: Measured) -> Stored:
        """Return what is written, in float32; what no later kind needs may be taken out."""
        ...


def kind_for(name: str) -> Kind:
    """Return the kind of that name."""
    return import_module(f"{__name__}.{name}")


def needs_of(kinds: Iterable[str]) -> frozenset[str]:
    """Return all that has to be measured for some kinds."""
    return frozenset[str]().union(*(kind_for(kind).NEEDS for kind in kinds))


def need_gradients(kinds: Iterable[str]) -> bool:
    """Return whether any of the kinds asks for y, so that an estimator matters."""
    return bool(needs_of(kinds) - {INPUTS})
