"""Every parameter of a model has one way to be measured; this is who finds it.

No parameter requires a gradient, so autograd never forms a weight gradient. Each module that owns
parameters runs by its layer's rule instead, and the rule adds its examples' squares. Where a rule
does not hold, its parameters climb one rung of this ladder, while the rules are being verified:

    the layer's own rule                  the price of the ordinary gradient
    the module runs again, by example     `Local` at the module that owns the parameter
    its parent runs again, by example     `Local` there
    loose                                 the whole model runs, one example at a time
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from fisher_mergekit.errors import MeasureError
from fisher_mergekit.measure.axes import Axes, NoExamples
from fisher_mergekit.measure.batches import Batch
from fisher_mergekit.measure.factors import Factors
from fisher_mergekit.measure.inputs import Inputs, Use
from fisher_mergekit.measure.layers import layer_for
from fisher_mergekit.measure.layers.base import Unfit, own_parameters
from fisher_mergekit.measure.layers.local import Local
from fisher_mergekit.measure.scaling import Overflow, all_finite, fitting, halved, is_half, scaled
from fisher_mergekit.measure.sites import Backward, Site
from fisher_mergekit.measure.squares import Squares
from fisher_mergekit.measure.tapped import TappedLayer, installed

LOG = logging.getLogger(__name__)

_IN_PLACE = "being modified inplace"
"""In PyTorch's message where a model writes into what a tap returned."""


class Irregular(Exception):
    """A rule does not cover how its layer is used; its parameters have climbed a rung."""


class Taps:
    """All parameters to measure, their layers, and the accumulators that the rules add to.

    Args:
        model: in evaluation mode, no parameter requiring a gradient.
        parameters: those to measure; all of the model's if None.

    Attributes:
        squares: the accumulators.
        loose: parameters that no rule covers; the session measures them example by example.
        anchor: where the gradients of a forward pass begin.
        factors: what is measured in the same passes; nothing, until somebody says so.
        copies: the model writes into what its modules return, as ResNet adds to it in place.
        scale: of the gradients (`scaling.py`); the totals hold its square. It falls
            where a gradient overflows, and what has been added falls with it.
    """

    anchor: Tensor

    def __init__(self, model: nn.Module, parameters: Iterable[nn.Parameter] | None = None):
        self.model = model
        chosen = list(model.parameters() if parameters is None else parameters)
        self.squares = Squares(chosen)
        self.loose: dict[nn.Parameter, str] = {}
        self.factors = Factors({})
        self.copies = False
        self.scale = 1.0
        self._names = {p: name for name, p in model.named_parameters()}
        self._is_half = is_half(chosen)
        self._layers: dict[str, TappedLayer] = {}
        self._axes = Axes(0, 0)
        self._sealed = False
        self._is_plain = False
        owners: dict[nn.Parameter, int] = {}
        for name, module in model.named_modules():
            own = {n: p for n, p in own_parameters(module).items() if p in self.totals}
            for parameter in own.values():
                owners[parameter] = owners.get(parameter, 0) + 1
            if own and name:
                self._layers[name] = TappedLayer(name, module, layer_for(module), own)
            for parameter in own.values() if not name else ():
                self.loosen(parameter, "the whole model owns it")
        # A tensor that two modules own (a tied head) gets its gradient from both.
        self.squares.shared |= {p for p, count in owners.items() if count > 1}
        self._leave_to_children()

    def _leave_to_children(self) -> None:
        """Measure what a module with a rule owns there alone, not in a container that also does.

        A masked language model's head holds its decoder's bias, and lets the decoder add it.
        """
        ruled = self._ruled
        for layer in filter(_is_local, list(self._layers.values())):
            for short in [n for n, p in layer.parameters.items() if p in ruled]:
                self._remove(layer, short)

    @property
    def again(self) -> list[str]:
        """Names of the parameters whose module, or its parent, runs again for each example."""
        local = {p for x in self._layers.values() if _is_local(x) for p in x.parameters.values()}
        return [name for name, p in self.model.named_parameters() if p in local]

    @property
    def most_examples(self) -> float:
        """How many examples a batch may have for the rules that hold something of each of them."""
        return min((x.rule.most_examples(x.parameters) for x in self._layers.values()), default=inf)

    @property
    def totals(self) -> dict[nn.Parameter, Tensor]:
        """The accumulator of each measured parameter."""
        return self.squares.totals

    def clear(self) -> None:
        """Forget all squares."""
        self.squares.clear()

    @property
    def is_empty(self) -> bool:
        """Whether no layer has a rule: all is left to the loop over single examples."""
        return not self._layers

    def check_finite(self) -> None:
        """Raise MeasureError for a total that is not finite."""
        self.squares.check_finite(self._names)

    def loosen_all(self, reason: str) -> None:
        """Leave all parameters to the loop over single examples, and say so once."""
        if len(self.loose) == len(self.totals):
            return
        LOG.warning("%s is measured one example at a time: %s.", "The whole model", reason)
        for parameter in self.totals:
            self._loosen(parameter)
        self._layers.clear()

    def loosen(self, parameter: nn.Parameter, reason: str) -> None:
        """Leave a parameter to the loop over single examples, and say so."""
        if parameter in self.loose:
            return
        LOG.warning("%s is measured one example at a time: %s.", self._names[parameter], reason)
        self._loosen(parameter)

    def _loosen(self, parameter: nn.Parameter) -> None:
        self.loose[parameter] = self._names[parameter]
        for layer, short in self._homes(parameter):
            self._remove(layer, short)

    def climb(self, parameters: Iterable[nn.Parameter], reason: str) -> None:
        """Measure parameters in the next slower way; those of one module climb together, once."""
        before = {parameter: self._homes(parameter) for parameter in parameters}
        for parameter, homes in before.items():
            if self._homes(parameter) != homes:
                continue  # with another one of its module
            if len(homes) == 1:
                self._climb(*homes[0], reason)
            else:
                self.loosen(parameter, reason)

    def _homes(self, parameter: nn.Parameter) -> list[tuple[TappedLayer, str]]:
        """Return where a parameter is measured, and its name there."""
        return [
            (layer, short)
            for layer in self._layers.values()
            for short, p in layer.parameters.items()
            if p is parameter
        ]

    def _climb(self, layer: TappedLayer, short: str, reason: str) -> None:
        parameter = layer.parameters[short]
        name, path = layer.name, short
        if isinstance(layer.rule, Local):  # from the owner to its parent, and no further
            parent, _, own = name.rpartition(".")
            name, path = ("", "") if "." in short else (parent, f"{own}.{short}")
        home = self._layers.get(name)
        if self._sealed or not name or not (home is None or home is layer or _is_local(home)):
            self.loosen(parameter, reason)
            return
        LOG.info("%s.%s: %s; %s runs again for each example.", layer.name, short, reason, name)
        self._remove(layer, short)
        if name in self._layers and not _is_local(self._layers[name]):
            for other in list(layer.parameters):  # the module has one rule only
                path_of = layer.parameters[other]
                self._remove(layer, other)
                self._at_local(name).parameters[other] = path_of
        self._at_local(name).parameters[path] = parameter

    def _at_local(self, name: str) -> TappedLayer:
        if name not in self._layers:
            module = self.model.get_submodule(name)
            self._layers[name] = TappedLayer(name, module, Local(), {})
        return self._layers[name]

    def _remove(self, layer: TappedLayer, short: str) -> None:
        del layer.parameters[short]
        if not layer.parameters:
            del self._layers[layer.name]

    def unreached(self) -> set[nn.Parameter]:
        """Return the parameters of which no module was called in the last forward pass.

        Such a module can be a mere container, and its parameters be used by another one.
        """
        layers = self._layers.values()
        reached = {p for layer in layers if layer.calls for p in layer.parameters.values()}
        return {p for layer in layers for p in layer.parameters.values()} - reached

    def seal(self) -> None:
        """Trust from now on the layers that the last forward pass reached, and no others.

        A layer that is reached later for the first time has not been compared with plain autograd.
        """
        for layer in self._layers.values():
            layer.settled = layer.calls > 0
        self._sealed = True

    @property
    def _idle(self) -> list[nn.Parameter]:
        """What nothing reached in verification: of no module that was called, and not compared."""
        layers = self._layers.values() if self._sealed else ()
        return [p for layer in layers if not layer.settled for p in layer.parameters.values()]

    @contextmanager
    def _installed(self) -> Iterator[None]:
        """Run the tapped modules by their rules inside the block.

        Idle parameters require a gradient there: one that is used where its module is not called
        (a table that another module looks up) would show in nothing else.
        """
        idle = self._idle
        for parameter in idle:
            parameter.requires_grad_(True)
        try:
            with installed(self, self._layers.values()):
                yield
        finally:
            for parameter in idle:
                parameter.requires_grad_(False)

    def forward(self, run: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
        """Run one batch's forward pass, tapped."""
        self.factors.begin(batch)
        while True:
            try:
                logits = self._forward(run, batch)
            except Irregular:
                continue  # its parameters have climbed, and nothing has been added yet
            self.factors.end()
            return logits

    def _forward(self, run: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
        self._axes = Axes.of(batch)
        self.factors.begin_again()
        self.anchor = torch.zeros((), device=batch.device, requires_grad=True)
        for layer in self._layers.values():
            layer.calls = 0
        with self._installed(), torch.enable_grad():
            try:
                return run(batch)
            except (RuntimeError, ValueError, IndexError) as error:
                if _IN_PLACE in str(error) and not self.copies:
                    self.copies = True
                    raise Irregular from error
                if self._sealed or isinstance(error, torch.OutOfMemoryError):
                    raise
                suspects = [x for x in self._layers.values() if x.calls and x.is_spread]
                if not suspects:
                    raise
                # A row an example where the model wants one row for all of them.
                for layer in suspects:
                    self._climb_all(layer, "it has one row for all examples")
                raise Irregular from error

    def backward(self, logits: Tensor, start: Tensor, *, keep_graph: bool) -> None:
        """Run one backward pass from `start`, adding every parameter's squares to the totals.

        Raises:
            Irregular: a rule failed, before the taps were sealed. The totals are half-written.
        """
        if not logits.requires_grad:
            return  # no layer with a rule took part
        self.squares.begin()
        self.factors.begin_backward()
        idle = self._idle
        while True:
            self.squares.begin_again()
            self.factors.begin_backward_again()
            try:
                with self._installed():  # checkpointed layers run again
                    _, *awake = torch.autograd.grad(
                        logits,
                        [self.anchor, *idle],
                        scaled(start, self.scale, logits.dtype),
                        retain_graph=keep_graph or self._is_half,
                        allow_unused=True,
                    )
                break
            except Overflow:
                self._lower_scale()
        self.squares.settle(self._cannot_meet)
        for parameter, gradient in zip(idle, awake, strict=True):
            if gradient is not None:
                self.loosen(parameter, "it is used where its module is not called")

    def fit_scale(self, start: Tensor) -> None:
        """Choose the scale by a start, while nothing has been added yet."""
        if self._is_half:
            self.scale = fitting(start)

    def _lower_scale(self) -> None:
        """Halve the scale, and with it what has been added so far."""
        self.scale = halved(self.scale)
        self.squares.quarter()

    def _cannot_meet(self, parameter: nn.Parameter, error: MeasureError) -> None:
        if self._sealed:
            raise error
        self.loosen(parameter, error.message.rstrip("."))
        raise Irregular from error

    def call(self, layer: TappedLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a module by its rule.

        Raises:
            Irregular: the rule does not cover this call.
        """
        if self._is_plain or not layer.parameters:
            return layer.forward(*args, **kwargs)
        if self._sealed and not layer.settled:
            self._climb_all(layer, "none of the examples used for verification reached it")
            raise Irregular(layer.name)
        if torch._C._current_graph_task_id() == -1:  # else a checkpointed layer runs again
            layer.calls += 1
            if layer.calls > 1:
                self.squares.shared.update(layer.parameters.values())
        site = Site(self, layer, layer.module, layer.parameters, layer.forward, self._axes)
        try:
            return layer.rule.call(site, *args, **kwargs)
        except NoExamples:
            self._climb_all(layer, "its input has no axis of examples")
        except Unfit as error:
            self._climb_all(layer, str(error))
        raise Irregular(layer.name)

    def _climb_all(self, layer: TappedLayer, reason: str) -> None:
        for short in list(layer.parameters):
            if short in layer.parameters:
                self._climb(layer, short, reason)

    def take(
        self,
        site: Site,
        backward: Backward,
        saved: Sequence[Tensor],
        gradients: Sequence[Tensor],
        uses: Mapping[str, Use],
    ) -> Sequence[Tensor | None]:
        """Receive one tap; return the gradients with respect to the layer's inputs."""
        layer: TappedLayer = site.layer
        self._is_plain = True  # some rules run their module again
        try:
            found, contributions = backward(saved, gradients)
        except (RuntimeError, TypeError, ValueError, IndexError, NoExamples, Unfit) as error:
            if self._sealed or isinstance(error, torch.OutOfMemoryError):
                raise
            self._climb_all(layer, f"its rule fails ({error})")
            raise Irregular(layer.name) from error
        finally:
            self._is_plain = False
        if self._is_half:
            own = [tensor for c in contributions.values() for tensor in vars(c).values()]
            if not all_finite([*gradients, *own]):
                raise Overflow
        for short, contribution in contributions.items():
            parameter = layer.parameters.get(short)
            if parameter is None:
                continue
            try:
                self.squares.take(parameter, contribution)
            except MeasureError as error:
                self._cannot_meet(parameter, error)
        self.factors.take(layer.parameters, uses, gradients[0], self.scale)
        return found

    def see(self, site: Site, inputs: Mapping[str, Inputs], given: Tensor) -> None:
        """Hand on what a linear layer is given."""
        self.factors.see(site.parameters, inputs, given)

    def has_rules_for(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Return whether all of them are measured by their layers' own rules."""
        return self._ruled.issuperset(parameters)

    @property
    def _ruled(self) -> set[nn.Parameter]:
        layers = self._layers.values()
        return {p for x in layers if not _is_local(x) for p in x.parameters.values()}


def _is_local(layer: TappedLayer) -> bool:
    return isinstance(layer.rule, Local)
