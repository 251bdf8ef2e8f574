"""The diagonal Fisher's accumulators: squared per-example gradients, summed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn

from fisher_mergekit.errors import MeasureError
from fisher_mergekit.measure.contributions import Contribution, add_squares


class Squares:
    """One accumulator a parameter, and the contributions that have to meet before the square.

    Args:
        parameters: those to measure.

    Attributes:
        totals: float32, of each parameter.
        shared: parameters that are used more than once in a pass; their contributions wait for
            each other.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.totals = {p: torch.zeros_like(p, dtype=torch.float32) for p in parameters}
        self.shared: set[nn.Parameter] = set()
        self._pending: dict[nn.Parameter, list[Contribution]] = {}
        self._added: set[nn.Parameter] = set()

    def clear(self) -> None:
        """Forget all squares."""
        self._pending.clear()
        for total in self.totals.values():
            total.zero_()

    def begin(self) -> None:
        """Get ready for a backward pass."""
        self._added.clear()
        self.begin_again()

    def begin_again(self) -> None:
        """Get ready for the same pass once more: what has been added is not added twice."""
        self._pending.clear()

    def take(self, parameter: nn.Parameter, contribution: Contribution) -> None:
        """Receive one use of a parameter.

        Raises:
            MeasureError: contributions of this kind cannot be added.
        """
        if parameter in self.shared:
            self._pending.setdefault(parameter, []).append(contribution)
        else:
            self._add(parameter, [contribution])

    def settle(self, failed: Callable[[nn.Parameter, MeasureError], None]) -> None:
        """Add what has waited; tell `failed` of contributions that cannot meet."""
        for parameter, contributions in self._pending.items():
            try:
                self._add(parameter, contributions)
            except MeasureError as error:
                failed(parameter, error)
        self._pending.clear()

    def quarter(self) -> None:
        """Follow gradients whose scale is halved."""
        for total in self.totals.values():
            total.div_(4)

    def check_finite(self, names: Mapping[nn.Parameter, str]) -> None:
        """Raise MeasureError for a total that is not finite."""
        for parameter, total in self.totals.items():
            if not total.isfinite().all():
                raise MeasureError(
                    f"the Fisher of {names[parameter]} is not finite. Look for NaN in the "
                    "weights, or measure in float32 (`dtype: float32`)."
                )

    def _add(self, parameter: nn.Parameter, contributions: Sequence[Contribution]) -> None:
        if parameter not in self._added:  # by the rules that ran before another's overflow
            add_squares(self.totals[parameter], contributions)
            self._added.add(parameter)
