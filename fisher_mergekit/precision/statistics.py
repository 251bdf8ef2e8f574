"""What a kind needs of each model: the measuring step gives it, and a sidecar holds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SQUARES, INPUTS, OUTPUTS = "squares", "inputs", "outputs"


@dataclass(frozen=True)
class Statistics:
    """What is measured of each model: squares, or inputs with or without outputs.

    All are means over the calibration data.

    Attributes:
        squares: of each parameter the square of its gradient of log p(y|x), the mean over examples.
        inputs: of each linear layer x xᵀ of its inputs x, one a row: the mean over rows, or the
            mean over examples of the sum over rows.
        outputs: of each linear layer g gᵀ of the gradients g of log p(y|x) with respect to its
            outputs, the mean over examples of the sum over rows.
    """

    squares: bool = False
    inputs: Literal["examples", "rows"] | None = None
    outputs: bool = False

    def __post_init__(self) -> None:
        if self.squares == bool(self.inputs) or (self.outputs and not self.inputs):
            raise ValueError("a sidecar holds squares, or inputs with or without outputs")

    @property
    def names(self) -> frozenset[str]:
        """Names of those that are wanted."""
        return frozenset(name for name in (SQUARES, INPUTS, OUTPUTS) if getattr(self, name))
