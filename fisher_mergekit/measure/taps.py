"""A model's passes with every module on the ladder tapped, and what the rules add to.

No parameter requires a gradient, so autograd never forms a weight gradient. Each module that owns
parameters runs by its layer's rule instead (`ladder.py` says by which), and the rule adds its
examples' squares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fisher_mergekit.errors import MeasureError
from fisher_mergekit.measure.axes import Axes, NoExamples
from fisher_mergekit.measure.batches import Batch
from fisher_mergekit.measure.factors import Factors
from fisher_mergekit.measure.inputs import Inputs, Use
from fisher_mergekit.measure.ladder import Ladder
from fisher_mergekit.measure.layers.base import Unfit
from fisher_mergekit.measure.scaling import Overflow, all_finite, fitting, halved, is_half, scaled
from fisher_mergekit.measure.sites import Backward, Site
from fisher_mergekit.measure.squares import Squares
from fisher_mergekit.measure.tapped import TappedLayer, installed

_IN_PLACE = "being modified inplace"
"""In PyTorch's message where a model writes into what a tap returned."""


class Irregular(Exception):
    """A rule does not cover how its layer is used; its parameters have climbed a rung."""


class Taps(Ladder):
    """Runs a model's batches, tapped, and hands what the rules find to the accumulators.

    Args:
        model: in evaluation mode, no parameter requiring a gradient.
        parameters: those to measure; all of the model's if None.

    Attributes:
        squares: the accumulators.
        anchor: where the gradients of a forward pass begin.
        factors: what is measured in the same passes; nothing, until somebody says so.
        copies: the model writes into what its modules return, as ResNet adds to it in place.
        scale: of the gradients (`scaling.py`); the totals hold its square. It falls
            where a gradient overflows, and what has been added falls with it.
    """

    anchor: Tensor

    def __init__(self, model: nn.Module, parameters: Iterable[nn.Parameter] | None = None):
        super().__init__(model, model.parameters() if parameters is None else parameters)
        self.squares = Squares(self.measured)
        self.factors = Factors({})
        self.copies = False
        self.scale = 1.0
        self._is_half = is_half(self.measured)
        self._axes = Axes(0, 0)
        self._is_plain = False
        # A tensor that two modules own (a tied head) gets its gradient from both.
        self.squares.shared |= self.owned_twice

    @property
    def totals(self) -> dict[nn.Parameter, Tensor]:
        """The accumulator of each measured parameter."""
        return self.squares.totals

    def clear(self) -> None:
        """Forget all squares."""
        self.squares.clear()

    def check_finite(self) -> None:
        """Raise MeasureError for a total that is not finite."""
        self.squares.check_finite(self._names)

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
