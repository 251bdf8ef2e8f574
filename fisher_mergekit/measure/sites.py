"""A *tap* is one layer's inputs and output gradients for one batch; a *site* is where it is taken.

A layer's rule runs its module inside a `torch.autograd.Function`, whose backward hands the tap to
the rule and the rule's contributions to the accumulators. A Function, unlike hooks, is called once
for one backward, keeps its input where saved-tensor hooks can reach it, and does not mind in-place
operations after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fisher_mergekit.measure.axes import Axes
from fisher_mergekit.measure.contributions import Contribution
from fisher_mergekit.measure.inputs import Inputs, Use

Forward = Callable[..., Any]
"""Tensors to a tensor or a tuple of them, without a gradient."""
Backward = Callable[
    [Sequence[Tensor], Sequence[Tensor]],
    tuple[Sequence[Tensor | None], Mapping[str, Contribution]],
]
"""(saved tensors, gradients of the outputs) to the gradients of the tensors that `Forward` got,
and the contributions to the parameters that the site measures, by their names there."""


class Owner(Protocol):
    """What a site belongs to: it starts the gradients and takes the contributions.

    Attributes:
        anchor: where the gradients of a forward pass begin.
        copies: the model writes into what its modules return, which autograd forbids for views.
    """

    anchor: Tensor
    copies: bool

    def take(
        self,
        site: Site,
        backward: Backward,
        saved: Sequence[Tensor],
        gradients: Sequence[Tensor],
        uses: Mapping[str, Use],
    ) -> Sequence[Tensor | None]:
        """Run a rule's backward and keep its contributions; return the tensors' gradients.

        Args:
            uses: how the outputs, of which `gradients` are, came of linear layers' weights.
        """
        ...

    def see(self, site: Site, inputs: Mapping[str, Inputs], given: Tensor) -> None:
        """Receive what the site's weights are given, when it is called with `given`."""
        ...


@dataclass(frozen=True)
class Site:
    """One call of one module, as its rule sees it.

    Attributes:
        layer: the tapped layer, for its owner.
        module: the module.
        parameters: what is to be measured here, by name relative to the module.
        forward: the module's own forward, whatever stands in its place meanwhile.
        axes: where the examples are in this batch's tensors.
    """

    owner: Owner
    layer: Any
    module: nn.Module
    parameters: Mapping[str, nn.Parameter]
    forward: Forward
    axes: Axes

    def spread(self, x: Tensor) -> Tensor:
        """Repeat one row that holds for all examples: a row for each of them."""
        if len(x) != 1 or self.axes.rows == 1:
            return x
        self.layer.is_spread = True
        return x.expand(self.axes.rows, *x.shape[1:])

    def tap(
        self,
        forward: Forward,
        backward: Backward,
        *tensors: Tensor,
        saved: Any = None,
        inputs: Mapping[str, Inputs] | None = None,
        given: Tensor | None = None,
    ) -> Any:
        """Run `forward` on tensors, and `backward` when their gradients are asked for.

        Args:
            saved: what `backward` needs; the tensors themselves if None.
            inputs: what `forward` gives to weights of linear layers.
            given: the tensor that the module was called with, where that is another.
        """
        keep = tensors if saved is None else tuple(saved)
        inputs = inputs or {}
        if inputs:
            self.owner.see(self, inputs, tensors[0] if given is None else given)
        uses = {name: x.use for name, x in inputs.items()}
        # The anchor requires a gradient, so that the output of an embedding does too.
        return _Tap.apply(self.owner.anchor, self, forward, backward, keep, uses, *tensors)


class _Tap(torch.autograd.Function):
    """A layer's ordinary forward; its backward is the layer's rule."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        site: Site,
        forward: Forward,
        backward: Backward,
        saved: Sequence[Tensor],
        uses: Mapping[str, Use],
        *tensors: Tensor,
    ) -> Any:
        ctx.site, ctx.rule, ctx.uses = site, backward, uses
        ctx.save_for_backward(*saved)
        found = forward(*tensors)
        if not site.owner.copies:
            return found
        return found.clone() if isinstance(found, Tensor) else tuple(y.clone() for y in found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.site.owner.take(ctx.site, ctx.rule, ctx.saved_tensors, gradients, ctx.uses)
        return (None, None, None, None, None, None, *found)
