"""What a layer type has to say of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

from fisher_mergekit.measure.contributions import Contribution


class Layer(ABC):
    """One layer type. A subclass writes `matches` and `backward`.

    A rule covers *all* parameters that its module owns itself, and the module is a function of one
    tensor whose first axis is the examples: `[b, …, features]`, or `[b, t]` ids.
    """

    known: ClassVar[list[type[Layer]]] = []

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        Layer.known.append(cls)

    @classmethod
    @abstractmethod
    def matches(cls, module: nn.Module) -> bool:
        """Return whether this rule holds for the module."""

    @abstractmethod
    def backward(
        self, module: Any, x: Tensor, gradient: Tensor
    ) -> tuple[Tensor | None, dict[str, Contribution]]:
        """Take one batch's tap apart.

        Args:
            module: the layer; its parameters do not require gradients.
            x: its input, `[b, …]`.
            gradient: of log p with respect to its output.

        Returns:
            The gradient with respect to `x` (None if x is not differentiable), and the
            contribution to each of the module's own parameters, by name.
        """


def tokens(x: Tensor) -> Tensor:
    """View `[b, …, d]` as `[b, t, d]`, with t = 1 for `[b, d]`."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that the module itself owns, by their short names."""
    return dict(module.named_parameters(recurse=False))
