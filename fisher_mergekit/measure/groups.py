"""Weights that get the same inputs, and so have one sum together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias
from weakref import ref

from torch import Tensor, nn

from fisher_mergekit.measure.inputs import Use

ONCE = "once"
"""A reading: one row that is no example's own is not repeated for each of them."""

TokenReading: TypeAlias = str | None
"""What says which tokens the rows of a call are: a mask's name, `ONCE`, or None: all are."""


class Unaligned(Exception):
    """A pass looks otherwise than the one by which rows were read, or inputs shared.

    Args:
        reason: for the user.
        is_shared: it is only that layers do not share their inputs.
        is_unclear: it is only that readings differ that were the same when they were verified.
    """

    def __init__(self, reason: str, *, is_shared: bool = False, is_unclear: bool = False):
        super().__init__(reason)
        self.is_shared = is_shared
        self.is_unclear = is_unclear


@dataclass(frozen=True, eq=False)
class Given:
    """A tensor that a layer was given, which is not kept."""

    tensor: ref[Tensor]
    version: int

    @classmethod
    def of(cls, x: Tensor) -> Given:
        """Return how to know a tensor again."""
        return cls(ref(x), x._version)

    def is_still(self, x: Tensor) -> bool:
        """Return whether it is that very tensor, and nothing was written into it since."""
        return self.tensor() is x and self.version == x._version


@dataclass(eq=False)
class SharedInputs:
    """Weights that get the same inputs, by the calls of the first of them.

    Attributes:
        leader: the first of them.
        use: its.
        readings: for each call, what may tell which tokens its rows are. Those that say the same
            of the pass that was traced stand together.
        choice: which of them does.
        total: Σ x xᵀ, `[i, i]`; `[e, i, i]` of experts; of lookups the diagonal, `[v]`.
        rows: how many rows were summed; `[e]` of experts.
        given: what the calls of this pass were given.
    """

    leader: nn.Parameter
    use: Use
    readings: list[list[tuple[TokenReading, ...]]] = field(default_factory=list)
    choice: int = 0
    total: Tensor | None = None
    rows: Tensor | None = None
    given: list[Given] = field(default_factory=list)

    def reading(self, call: int) -> tuple[TokenReading, ...]:
        """Return what says which tokens the rows of a call are."""
        if call >= len(self.readings):
            raise Unaligned("a layer is called more often than before")
        return self.readings[call][min(self.choice, len(self.readings[call]) - 1)]

    @property
    def is_once(self) -> bool:
        """Whether a row that is no example's own is counted once."""
        return any(self.reading(call) == (ONCE,) for call in range(len(self.readings)))

    def stop_repeating(self) -> bool:
        """Count a row that is no example's own once; return whether that is another reading."""
        was, last = self.choice, max(map(len, self.readings)) - 1
        if any(readings[-1] == (ONCE,) for readings in self.readings):
            self.choice = last
        return self.choice != was

    def next_reading(self) -> bool:
        """Read rows in the next possible way; return whether there is one."""
        self.choice += 1
        return self.choice < max(map(len, self.readings))
