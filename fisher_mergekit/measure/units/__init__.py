"""One file a unit: whose gradient is squared whole.

Both are one backward pass. To add one, write a file here that defines `weigh`; its name is the
unit's.
"""

from __future__ import annotations

from importlib import import_module
from typing import Protocol

from torch import Tensor

from fisher_mergekit.measure.batches import Batch


class Unit(Protocol):
    """What a file here defines."""

    def weigh(self, start: Tensor, batch: Batch, seed: int) -> Tensor:
        """Return an estimator's start in such a way that the right thing is squared."""
        ...


def unit_for(name: str) -> Unit:
    """Return the unit of that name."""
    return import_module(f"{__name__}.{name}")
