"""What every way to go over a batch has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from cases import Case


class Unable(Exception):
    """This way cannot go over this model; the message says why."""


class Way(ABC):
    """One column of the table.

    The constructor does what is done once a model, such as installing hooks.

    Attributes:
        title: of the column.
        takes_labels: whether one outcome an example is squared, the label; that is compared.
    """

    title: ClassVar[str]
    takes_labels: ClassVar[bool] = True

    def __init__(self, case: Case):
        self.case = case

    @abstractmethod
    def run(self) -> None:
        """Go over the batch once: forward, backward, and the squares added to what is there."""

    def squares(self) -> dict[str, Tensor]:
        """Return the squared gradients, summed over the examples of all runs so far.

        Keys are the parameters' names in the model, and only those that are covered.
        """
        return {}

    def notes(self) -> list[str]:
        """Return what a reader has to know of this way on this model."""
        return []


class Library(Way):
    """A way of a library that may not be installed, or may not know a model's layers."""


def names(model: nn.Module) -> dict[nn.Parameter, str]:
    """Return the name of each parameter; a tied one has that of its first place."""
    return {parameter: name for name, parameter in model.named_parameters()}
