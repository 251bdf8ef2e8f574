"""Passes that measure factors and nothing else: linear layers are listened to, all else is plain.

What a layer's rows are is verified before the first batch: three examples of different lengths,
padded together, have to give what each of them gives alone. Where they do not, or where a batch
looks otherwise than those three, examples come alone, and there is no padding to be told from rows.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fisher_mergekit.errors import FisherMergekitError
from fisher_mergekit.measure.axes import Axes, NoExamples
from fisher_mergekit.measure.batches import Batch, Example, collate
from fisher_mergekit.measure.causality import check_causal
from fisher_mergekit.measure.factors import Factors
from fisher_mergekit.measure.groups import SharedInputs, Unaligned
from fisher_mergekit.measure.inputs import Inputs, Use
from fisher_mergekit.measure.layers import layer_for
from fisher_mergekit.measure.layers.base import OneInput, Unfit, own_parameters
from fisher_mergekit.measure.passes import Passes
from fisher_mergekit.measure.probe import TOLERANCE, FirstBatches, spread
from fisher_mergekit.measure.scaling import Overflow, all_finite, fitting, halved, is_half, scaled
from fisher_mergekit.measure.sites import Backward, Site
from fisher_mergekit.measure.tapped import TappedLayer, installed

LOG = logging.getLogger(__name__)

ROUNDINGS = 100
"""How many roundings of the others' gradients a gradient of nothing else may be."""


class Listening:
    """Runs a model's batches and hands what its linear layers get to the factors.

    Args:
        passes: the model, whose parameters require no gradients.
        factors: the accumulators.

    Attributes:
        lost: names of modules that are called in a way that nothing here covers, and why.
    """

    anchor: Tensor
    copies = False

    def __init__(self, passes: Passes, factors: Factors):
        self._passes = passes
        self.factors = factors
        self.lost: dict[str, str] = {}
        self._layers: dict[str, TappedLayer] = {}
        self._axes = Axes(0, 0)
        self._is_plain = False
        self._scale = 1.0
        self._is_half = is_half(passes.model.parameters())
        self._first = FirstBatches(passes.logits)
        for name, module in passes.model.named_modules():
            rule = layer_for(module)
            own = {n: p for n, p in own_parameters(module).items() if p in factors.parameters}
            described = {n: p for n, p in own.items() if n in rule.described(module)}
            if described:
                self._layers[name] = TappedLayer(name, module, rule, described)

    def add(self, batch: Batch) -> None:
        """Add one batch's moments.

        Raises:
            Unaligned: sums have to begin anew, another way.
        """
        if self.factors.is_alone:
            for index in range(len(batch)):
                self._pass(batch.single(index))
            return
        if self._first.is_moved(batch):
            raise Unaligned("padding, or what else is in a batch, moves its predictions")
        self._pass(batch)

    def fall_back(self, error: Unaligned) -> None:
        """Measure in the next slower way."""
        if error.is_shared and not self.factors.is_separate:
            LOG.info("%s: each layer has sums of its own.", error)
            self.factors.separate()
        else:
            LOG.warning("Factors are measured one example at a time: %s.", error)
            self.factors.is_alone = True

    def verify(self, examples: Sequence[Example]) -> None:
        """Find out who shares inputs, and how rows are read; see the top of this file."""
        self.verify_on(collate(spread(examples, 3), self._passes.pad_token_id))

    def verify_on(self, unplaced: Batch) -> None:
        """Do so on a batch."""
        batch = self._passes.placed(unplaced)
        if self.factors.has_outputs and self._passes.likelihood.is_causal:
            check_causal(self._passes.logits, batch, type(self._passes.model).__name__)
        self._first.begin()
        self.factors.is_alone = False
        try:
            self._trace(batch)
            while not self._is_right(batch):
                pass
        except (FisherMergekitError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a model is a program: asserts, missing inputs, …
            why = (
                error
                if isinstance(error, Unaligned)
                else Unaligned(f"in batches it fails: {error}")
            )
            why.is_shared = False
            self.fall_back(why)
            self._trace(batch.single(0))
        self.factors.clear()

    def _is_right(self, batch: Batch) -> bool:
        """Return whether rows are read rightly; if not, another reading has been chosen.

        Raises:
            Unaligned: there is none.
        """
        groups = set(self.factors.groups.values())
        try:
            wrong = self._wrong(batch)
        except (RuntimeError, ValueError, IndexError) as error:
            repeating = {group for group in groups if group.stop_repeating()}
            if isinstance(error, torch.OutOfMemoryError) or not repeating:
                raise
            return False
        hopeless = {group for group in wrong if not group.next_reading()}
        names = sorted(str(self.factors.parameters[group.leader]) for group in hopeless)
        if hopeless and all(group.use.is_lookup for group in hopeless):
            # Which tokens are how far apart is no token's own row, and no linear layer's.
            LOG.info("Not described: %s.", ", ".join(names))
            self.factors.drop(p for p, g in self.factors.groups.items() if g in hopeless)
        elif wrong and hopeless == wrong:
            raise Unaligned(f"{names[0]} does not get in a batch what it gets alone")
        return not wrong

    def _wrong(self, batch: Batch) -> set[SharedInputs]:
        """Return whose sums over a batch are others than those of its examples alone."""
        factors = self.factors
        factors.clear()
        factors.misread = misread = set[SharedInputs]()
        try:
            self._pass(batch)
            sizes = factors.sizes()
            factors.sign = -1.0
            for index in range(len(batch)):
                self._pass(batch.single(index))
        finally:
            factors.sign, factors.misread = 1.0, None
        dtype = next(self._passes.model.parameters()).dtype
        largest = max((size for (role, _), size in sizes.items() if role == "outputs"), default=0.0)
        # Gradients that are zero on paper (a router's of one expert) are nothing but rounding.
        nothing = largest * (ROUNDINGS * torch.finfo(dtype).eps) ** 2
        differing = {
            parameter
            for (role, parameter), difference in factors.sizes().items()
            if difference > TOLERANCE[dtype] * sizes[role, parameter]
            and (role == "inputs" or difference > nothing)
        }
        miscounted = {g for g in factors.groups.values() if g.rows is None or g.rows.any()}
        return misread | miscounted | {factors.groups[parameter] for parameter in differing}

    def _trace(self, batch: Batch) -> None:
        with self.factors.tracing(), torch.no_grad():
            self._forward(batch)

    def _pass(self, batch: Batch) -> None:
        with torch.set_grad_enabled(self.factors.has_outputs):
            logits = self._forward(batch)
        if self.factors.has_outputs:
            starts = self._passes.starts(logits, batch)
            for number, start in enumerate(starts, start=1):
                self._backward(logits, start, keep_graph=number < len(starts))

    def _forward(self, batch: Batch) -> Tensor:
        self._axes = Axes.of(batch)
        self.anchor = torch.zeros((), device=batch.device, requires_grad=True)
        self.factors.begin(batch)
        with installed(self, self._layers.values()):
            logits = self._passes.logits(batch)
        self.factors.end()
        return logits

    def _backward(self, logits: Tensor, start: Tensor, *, keep_graph: bool) -> None:
        if not logits.requires_grad:
            return  # no linear layer took part
        self.factors.begin_backward()
        self._scale = fitting(start) if self._is_half else 1.0
        while True:
            try:
                with installed(self, self._layers.values()):  # checkpointed layers run again
                    logits.backward(
                        scaled(start, self._scale, logits.dtype),
                        retain_graph=keep_graph or self._is_half,
                    )
                return
            except Overflow:
                self._scale = halved(self._scale)
                self.factors.begin_backward_again()

    def call(self, layer: TappedLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a module, and listen."""
        if self._is_plain or layer.name in self.lost:
            return layer.forward(*args, **kwargs)
        site = Site(self, layer, layer.module, layer.parameters, layer.forward, self._axes)
        try:
            if isinstance(layer.rule, OneInput):
                return self._one(site, layer.rule, [*args, *kwargs.values()])
            return layer.rule.call(site, *args, **kwargs)
        except NoExamples as error:
            if not self.factors.is_alone:
                raise Unaligned(f"{layer.name}'s input has no axis of examples") from error
            why = "its input has no axis of examples"
        except Unfit as error:
            why = str(error)
        LOG.warning("%s is not described: %s.", layer.name, why)
        self.lost[layer.name] = why
        self.factors.drop(layer.parameters.values())
        return layer.forward(*args, **kwargs)

    def _one(self, site: Site, rule: OneInput, tensors: Sequence[Any]) -> Any:
        """Run a layer of one input plainly: where its examples are does not matter here."""
        if len(tensors) != 1 or not isinstance(tensors[0], Tensor):
            raise Unfit("it is called with more than one tensor")
        given = tensors[0]
        x = site.spread(given) if given.dim() else given
        inputs = rule.inputs(site.module, x)
        self.see(site, inputs, given)
        has_gradient = torch.is_grad_enabled() and bool(inputs)
        # One row for all examples is repeated for them only where each gets a gradient of its own.
        groups = [self.factors.groups.get(parameter) for parameter in site.parameters.values()]
        is_once = any(group is not None and group.is_once for group in groups)
        y = site.forward(x if has_gradient and not is_once else given)
        if has_gradient:
            # Not even an embedding's output requires a gradient by itself: no parameter does.
            y = y if y.requires_grad else y + self.anchor
            # What a model writes into y later goes around whatever made a view of y.
            y = y.clone() if y._is_view() else y
            uses = {name: seen.use for name, seen in inputs.items()}
            y.grad_fn.register_prehook(lambda gradients: self._take(site, uses, gradients[0]))
        return y

    def _take(self, site: Site, uses: Mapping[str, Use], gradient: Tensor | None) -> None:
        if gradient is None:
            return
        if self._is_half and not all_finite([gradient]):
            raise Overflow
        self.factors.take(site.parameters, uses, gradient, self._scale)

    def see(self, site: Site, inputs: Mapping[str, Inputs], given: Tensor) -> None:
        """Receive what a site's weights are given."""
        self.factors.see(site.parameters, inputs, given)

    def take(
        self,
        site: Site,
        backward: Backward,
        saved: Sequence[Tensor],
        gradients: Sequence[Tensor],
        uses: Mapping[str, Use],
    ) -> Sequence[Tensor | None]:
        """Receive a site's output gradients; return those with respect to its inputs."""
        self._is_plain = True
        try:
            found, _ = backward(saved, gradients)
        finally:
            self._is_plain = False
        self._take(site, uses, gradients[0])
        return found
