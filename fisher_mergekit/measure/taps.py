"""A *tap* is one layer's inputs and output gradients for one batch.

No parameter requires a gradient, so autograd never forms a weight gradient. Instead each layer with
a rule runs inside a `torch.autograd.Function`, whose backward hands the tap to the layer's rule and
the rule's contributions to the accumulators. A Function, unlike hooks, is called once for one
backward, keeps its input where saved-tensor hooks can reach it, and does not mind in-place
operations after it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fisher_mergekit.measure.contributions import Contribution, add_squares
from fisher_mergekit.measure.layers import layer_for
from fisher_mergekit.measure.layers.base import Layer, own_parameters

LOG = logging.getLogger(__name__)


class Irregular(Exception):
    """A layer was used in a way that its rule does not cover; its parameters are loose now."""


@dataclass
class _TappedLayer:
    """A module, its rule, and its own parameters."""

    name: str
    module: nn.Module
    rule: Layer
    parameters: dict[str, nn.Parameter]
    calls: int = 0
    verified: bool = False

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The module's own forward, whatever stands in its place meanwhile."""
        y: Tensor = type(self.module).forward(self.module, *args, **kwargs)
        return y


@dataclass
class Taps:
    """All layers of a model that have a rule, and the accumulators that they add to.

    Args:
        model: in evaluation mode, no parameter requiring a gradient.

    Attributes:
        totals: float32 accumulator of each measured parameter.
        loose: parameters that no rule covers; the session measures them example by example.
    """

    model: nn.Module
    totals: dict[nn.Parameter, Tensor] = field(init=False)
    loose: dict[nn.Parameter, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.totals = {p: torch.zeros_like(p, dtype=torch.float32) for p in self.model.parameters()}
        self._layers: list[_TappedLayer] = []
        self._shared: set[nn.Parameter] = set()
        self._pending: dict[nn.Parameter, list[Contribution]] = {}
        self._batch_size = 0
        self._sealed = False
        self._anchor: Tensor | None = None
        owners: dict[nn.Parameter, int] = {}
        for name, module in self.model.named_modules():
            own = own_parameters(module)
            if not own:
                continue
            rule = layer_for(module)
            for parameter in own.values():
                owners[parameter] = owners.get(parameter, 0) + 1
            if rule is None:
                for short, parameter in own.items():
                    self.loosen(parameter, f"{name}.{short}".lstrip("."), "no rule for its layer")
            else:
                self._layers.append(_TappedLayer(name, module, rule, own))
        # A tensor that two modules own (a tied head) gets its gradient from both.
        self._shared |= {p for p, count in owners.items() if count > 1}

    def loosen(self, parameter: nn.Parameter, name: str, reason: str) -> None:
        """Leave a parameter to the loop over single examples, and say so."""
        if parameter not in self.loose:
            LOG.warning("%s is measured one example at a time: %s.", name, reason)
            self.loose[parameter] = name

    def seal(self) -> None:
        """Trust from now on the layers that the last forward pass reached, and no others.

        A layer that is reached later for the first time has not been compared with plain autograd.
        """
        for layer in self._layers:
            layer.verified = layer.calls > 0
        self._sealed = True

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Run the tapped layers' forward passes through `_Tap` inside the block."""
        before = {layer.name: layer.module.__dict__.get("forward") for layer in self._layers}
        for layer in self._layers:
            layer.module.forward = _Forward(self, layer)
        try:
            yield
        finally:
            for layer in self._layers:
                original = before[layer.name]
                if original is None:
                    del layer.module.forward
                else:
                    layer.module.forward = original

    def start(self, batch_size: int, device: torch.device) -> None:
        """Get ready for one batch's forward pass."""
        self._batch_size = batch_size
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        for layer in self._layers:
            layer.calls = 0

    def backward(self, logits: Tensor, start: Tensor, *, keep_graph: bool) -> None:
        """Run one backward pass from `start`, adding every parameter's squares to the totals.

        Raises:
            Irregular: a rule failed, before the taps were sealed. The totals are half-written.
        """
        assert self._anchor is not None
        if not logits.requires_grad:
            return  # no layer with a rule took part
        self._pending.clear()
        torch.autograd.grad(logits, self._anchor, start, retain_graph=keep_graph, allow_unused=True)
        for parameter, contributions in self._pending.items():
            add_squares(self.totals[parameter], contributions)
        self._pending.clear()

    def call(self, layer: _TappedLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Run a layer's forward pass through `_Tap`.

        Raises:
            Irregular: the call is not a function of one tensor with the examples first.
        """
        if self._is_loose(layer):
            return layer.forward(*args, **kwargs)
        if kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
            raise self._irregular(layer, "it is called with more than one tensor")
        x = args[0]
        if x.dim() >= 2 and len(x) == 1 and self._batch_size > 1:
            # One row that broadcasts over the examples, like positions: a row for each of them.
            x = x.expand(self._batch_size, *x.shape[1:])
        if x.dim() < 2 or len(x) != self._batch_size:
            raise self._irregular(layer, f"its input {list(x.shape)} has no axis of examples")
        if self._sealed and not layer.verified:
            raise self._irregular(layer, "none of the examples used for verification reached it")
        layer.calls += 1
        if layer.calls > 1:
            self._shared.update(layer.parameters.values())
        y: Tensor = _Tap.apply(self._anchor, self, layer, x)
        return y

    def _is_loose(self, layer: _TappedLayer) -> bool:
        return all(p in self.loose for p in layer.parameters.values())

    def _irregular(self, layer: _TappedLayer, reason: str) -> Irregular:
        for short, parameter in layer.parameters.items():
            self.loosen(parameter, f"{layer.name}.{short}", reason)
        return Irregular(layer.name)

    def take(self, layer: _TappedLayer, x: Tensor, gradient: Tensor) -> Tensor | None:
        """Receive one tap; return the gradient with respect to the layer's input."""
        try:
            x_gradient, contributions = layer.rule.backward(layer.module, x, gradient)
        except (RuntimeError, TypeError, ValueError) as error:
            if self._sealed or isinstance(error, torch.OutOfMemoryError):
                raise
            raise self._irregular(layer, f"its rule fails ({error})") from error
        for short, contribution in contributions.items():
            parameter = layer.parameters[short]
            if parameter in self.loose:
                continue
            if parameter in self._shared:
                self._pending.setdefault(parameter, []).append(contribution)
            else:
                add_squares(self.totals[parameter], [contribution])
        return x_gradient


@dataclass(frozen=True)
class _Forward:
    """The forward method that a tapped module has meanwhile."""

    taps: Taps
    layer: _TappedLayer

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.taps.call(self.layer, args, kwargs)


class _Tap(torch.autograd.Function):
    """A layer's ordinary forward; its backward is the layer's rule."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, taps: Taps, layer: _TappedLayer, x: Tensor) -> Tensor:
        # The anchor requires a gradient, so that the output of an embedding does too.
        ctx.taps, ctx.layer = taps, layer
        ctx.save_for_backward(x)
        return layer.forward(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return None, None, None, ctx.taps.take(ctx.layer, x, gradient)


def add_single_squares(
    totals: dict[nn.Parameter, Tensor],
    parameters: Iterable[nn.Parameter],
    logits: Tensor,
    start: Tensor,
    *,
    keep_graph: bool,
) -> None:
    """Add the squared gradient of one example, by plain autograd: the rule that is always right."""
    chosen = list(parameters)
    if not logits.requires_grad:
        return  # none of them took part
    gradients = torch.autograd.grad(
        logits, chosen, start, retain_graph=keep_graph, allow_unused=True
    )
    for parameter, gradient in zip(chosen, gradients, strict=True):
        if gradient is not None:
            totals[parameter].add_(gradient.float().square())
