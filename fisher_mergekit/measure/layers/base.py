"""What a layer type has to say of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from math import inf
from typing import Any, ClassVar

from torch import Tensor, nn

from fisher_mergekit.measure.axes import NoExamples
from fisher_mergekit.measure.contributions import Contribution
from fisher_mergekit.measure.inputs import Inputs
from fisher_mergekit.measure.sites import Site


class Unfit(Exception):
    """A module was called in a way that its rule does not cover."""


class Layer(ABC):
    """One layer type, for all parameters that its modules own themselves.

    Most layers are functions of one tensor: they are a subclass of `OneInput`. A rule need not be
    sure that it holds: it is verified on the model at hand before it is trusted.
    """

    known: ClassVar[list[type[Layer]]] = []

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "matches" in vars(cls):
            Layer.known.append(cls)

    @classmethod
    @abstractmethod
    def matches(cls, module: nn.Module) -> bool:
        """Return whether this rule holds for the module."""

    @abstractmethod
    def call(self, site: Site, *args: Any, **kwargs: Any) -> Any:
        """Do what the module's forward does, tapped.

        Raises:
            Unfit: it is called in a way that this rule does not cover.
            NoExamples: its input has no axis of examples.
        """

    def described(self, module: nn.Module) -> Collection[str]:
        """Return the parameters, by name, that are matrices of linear layers: `Inputs` go in."""
        return ()

    def most_examples(self, parameters: Mapping[str, nn.Parameter]) -> float:
        """Return how many examples it can treat at a time."""
        return inf


class OneInput(Layer):
    """A module of one tensor whose first axis is the examples: `[b, …, features]`, or `[b, t]` ids.

    A subclass writes `matches` and `backward`; a linear layer's, `described` and `inputs` too.
    """

    def call(self, site: Site, *args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        if len(given) != 1 or not isinstance(given[0], Tensor):
            raise Unfit("it is called with more than one tensor")
        axes, reading = site.axes, site.layer.read(site.axes, 0, given[0])
        if reading is None:
            raise NoExamples
        x = site.spread(given[0])
        shape = x.shape  # not x itself, which a checkpointed layer must be able to let go

        def backward(saved: Any, gradients: Any) -> Any:
            if len(gradients) != 1:
                raise Unfit("it gives more than one tensor")
            x_gradient, contributions = self.backward(
                site.module, axes.by_example(saved[0]), axes.by_example(gradients[0])
            )
            return [None if x_gradient is None else x_gradient.reshape(shape)], contributions

        inputs = self.inputs(site.module, x)
        return site.tap(site.forward, backward, x, inputs=inputs, given=given[0])

    def inputs(self, module: Any, x: Tensor) -> dict[str, Inputs]:
        """Return what a matrix of a linear layer is given, by its name, if there is one."""
        return {}

    @abstractmethod
    def backward(
        self, module: Any, x: Tensor, gradient: Tensor
    ) -> tuple[Tensor | None, dict[str, Contribution]]:
        """Take one batch's tap apart.

        Args:
            module: the layer; its parameters do not require gradients.
            x: its input, `[b, …]`.
            gradient: of log p with respect to its output, `[b, …]`.

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
