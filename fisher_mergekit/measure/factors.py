"""Kronecker factors: second moments of what goes into linear layers, and of what comes back.

    inputs   Σ x xᵀ over the rows that a layer gets                             (gram, kfac)
    outputs  Σ g gᵀ, g the gradient of log p(y|x) of the layer's output         (kfac)

The rows are those that each example alone gives the layer: padding is none of them. Which tokens a
layer's rows are is read off their number and verified (`readings.py`).

Layers that are given the very same tensor, as queries, keys and values are, have one input factor
together. Who shares is found out in one forward pass, and has to hold in every one after it.
Sums are in float32. Of a symmetric matrix only the upper triangle is summed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fisher_mergekit.errors import MeasureError
from fisher_mergekit.measure.batches import Batch
from fisher_mergekit.measure.groups import Given, SharedInputs, TokenReading, Unaligned
from fisher_mergekit.measure.inputs import Inputs, Use, add_moment, fill_lower
from fisher_mergekit.measure.probe import rms
from fisher_mergekit.measure.readings import Masks

WIDEST = 16_384
"""Outputs up to which their factor is a matrix (1 GiB); of more, it is the diagonal."""


@dataclass(frozen=True, eq=False)
class _Call:
    """A call while tracing; `number` is that of the first call that was given the same tensor."""

    parameter: nn.Parameter
    use: Use
    number: int
    readings: list[tuple[TokenReading, ...]]
    given: Given


class Factors:
    """The factors of a model's linear layers, as accumulators.

    Args:
        parameters: those that may be described.
        outputs: whether output factors are measured too.

    Attributes:
        groups: of the weights that are described.
        uses: of each of them.
        outputs: Σ g gᵀ of each of them, `[o, o]`, or `[o]` where that would be too large; `[e, …]`
            of experts.
        is_alone: examples come alone, so that there is no padding to be told from rows.
        sign: of what is added; -1 to compare.
        misread: while it is verified how rows are read, the groups whose number of rows did not
            match. None at other times, when a mismatch raises.
    """

    def __init__(self, parameters: Mapping[nn.Parameter, Any], *, outputs: bool = False):
        self.parameters = parameters
        self.has_outputs = outputs
        self.groups: dict[nn.Parameter, SharedInputs] = {}
        self.uses: dict[nn.Parameter, Use] = {}
        self.outputs: dict[nn.Parameter, Tensor] = {}
        self.is_alone = False
        self.sign = 1.0
        self.misread: set[SharedInputs] | None = None
        self._apart = False
        self._masks = Masks({})
        self._trace: list[_Call] | None = None
        self._seen: Counter[nn.Parameter] = Counter()
        self._summed: Counter[nn.Parameter] = Counter()
        self._taken: Counter[nn.Parameter] = Counter()
        self._added: Counter[nn.Parameter] = Counter()

    def clear(self) -> None:
        """Forget all sums."""
        self.outputs.clear()
        for group in self.groups.values():
            group.total = group.rows = None

    def drop(self, parameters: Iterable[nn.Parameter]) -> None:
        """Describe some weights no longer.

        Raises:
            Unaligned: others would have had their sums.
        """
        dropped = set(parameters)
        self.parameters = {p: n for p, n in self.parameters.items() if p not in dropped}
        leaders = set()
        for parameter in dropped:
            self.outputs.pop(parameter, None)
            self.uses.pop(parameter, None)
            group = self.groups.pop(parameter, None)
            if group is not None and group.leader is parameter:
                leaders.add(group)
        if leaders.intersection(self.groups.values()):
            raise Unaligned("a layer is called in a way that is not covered", is_shared=True)

    def separate(self) -> None:
        """Let no weights share their sums: they do not always get the same inputs."""
        self._apart = True
        self.groups = {p: SharedInputs(p, self.uses[p], g.readings) for p, g in self.groups.items()}

    @property
    def is_separate(self) -> bool:
        """Whether every weight has sums of its own."""
        return self._apart

    # -- a forward pass ---------------------------------------------------------------------------

    def begin(self, batch: Batch) -> None:
        """Get ready for a batch's forward pass."""
        self._masks = Masks(batch.token_masks() if self.parameters else {})
        self._summed.clear()
        self.begin_again()

    def begin_again(self) -> None:
        """Get ready for the same pass once more: what has been summed is not summed twice."""
        self._seen.clear()
        for group in self.groups.values():
            group.given.clear()

    def end(self) -> None:
        """Find out, after a forward pass, whether all that share inputs got them.

        Raises:
            Unaligned: some were not called as often as others.
        """
        for parameter, group in self.groups.items():
            if self._seen[parameter] != self._seen[group.leader]:
                raise Unaligned("not all layers that share inputs are called", is_shared=True)

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Find out, by one forward pass inside the block, which weights get the same inputs."""
        self._trace = trace = list[_Call]()
        try:
            yield
        finally:
            self._trace = None
        self.groups.clear()
        trace = [call for call in trace if call.parameter in self.parameters]
        matrices = {call.parameter for call in trace if not call.use.is_lookup}
        calls: dict[nn.Parameter, list[_Call]] = {}
        for call in trace:
            # A head that is tied to the embedding is a linear layer, not a lookup.
            if not (call.use.is_lookup and call.parameter in matrices):
                calls.setdefault(call.parameter, []).append(call)
        together: dict[object, SharedInputs] = {}
        for parameter, own in calls.items():
            use = self.uses[parameter] = own[0].use
            key = parameter if self._apart else tuple(call.number for call in own)
            group = SharedInputs(parameter, use, [call.readings for call in own])
            self.groups[parameter] = together.setdefault(key, group)

    def see(
        self, named: Mapping[str, nn.Parameter], inputs: Mapping[str, Inputs], given: Tensor
    ) -> None:
        """Receive what one call of a module gives its weights.

        Args:
            named: the module's parameters that are measured.
            inputs: by name there.
            given: the tensor that the module was called with.

        Raises:
            Unaligned: it is not as it was while tracing.
        """
        if torch._C._current_graph_task_id() != -1:
            return  # a checkpointed layer runs again
        for name, x in inputs.items():
            parameter = named.get(name)
            if parameter is None or parameter not in self.parameters:
                continue
            if self._trace is None:
                self._see(parameter, x, given)
                continue
            same = (c.number for c in self._trace if c.given.is_still(given))
            number = next(same, len(self._trace))
            readings = self._masks.readings(x, given)
            self._trace.append(_Call(parameter, x.use, number, readings, Given.of(given)))

    @torch.no_grad()
    def _see(self, parameter: nn.Parameter, inputs: Inputs, given: Tensor) -> None:
        if parameter not in self.groups:
            if not self.is_alone:
                raise Unaligned("a layer is called that was not before")
            self.uses[parameter] = inputs.use
            self.groups[parameter] = SharedInputs(parameter, inputs.use)
        group = self.groups[parameter]
        if self.uses[parameter].is_lookup != inputs.use.is_lookup:
            return
        call = self._seen[parameter]
        self._seen[parameter] += 1
        if parameter is not group.leader:
            if call >= len(group.given) or not group.given[call].is_still(given):
                raise Unaligned("layers get different inputs that got the same", is_shared=True)
            return
        group.given.append(Given.of(given))
        if call >= self._summed[parameter]:
            self._summed[parameter] += 1
            self._add(group, inputs if self.is_alone else self._unpadded(group, call, inputs))

    def _unpadded(self, group: SharedInputs, call: int, inputs: Inputs) -> Inputs:
        found = self._masks.unpadded(inputs, group.reading(call))
        if found is not None:
            return found
        if self.misread is None:
            raise Unaligned("a layer gets other rows than before")
        self.misread.add(group)
        return inputs

    def _add(self, group: SharedInputs, inputs: Inputs) -> None:
        x, use = inputs.x, inputs.use
        if group.total is None:
            experts = [] if use.offsets is None else [len(use.offsets) - 1]
            width = group.leader.shape[use.axis]
            shape = [*experts, width] if use.is_lookup else [*experts, width, width]
            group.total = torch.zeros(shape, device=x.device)
            group.rows = torch.zeros(experts, dtype=torch.float64)
        assert group.rows is not None
        add_moment(group.total, x, use, self.sign)
        edges = torch.tensor([0, inputs.count] if use.offsets is None else use.offsets)
        group.rows += self.sign * edges.diff().reshape(group.rows.shape)

    # -- a backward pass --------------------------------------------------------------------------

    def begin_backward(self) -> None:
        """Get ready for a backward pass."""
        self._added.clear()
        self.begin_backward_again()

    def begin_backward_again(self) -> None:
        """Get ready for the same pass once more: what has been added is not added twice."""
        self._taken.clear()

    def take(
        self,
        named: Mapping[str, nn.Parameter],
        uses: Mapping[str, Use],
        gradient: Tensor,
        scale: float,
    ) -> None:
        """Receive the gradient with respect to what one call gave, `[…, o]`, times a scale."""
        if not self.has_outputs:
            return
        for name, use in uses.items():
            parameter = named.get(name)
            known = None if parameter is None else self.uses.get(parameter)
            if parameter is None or known is None or known.is_lookup != use.is_lookup:
                continue
            self._taken[parameter] += 1
            if self._taken[parameter] > self._added[parameter]:
                self._added[parameter] += 1
                self._add_output(parameter, use, gradient, self.sign / scale**2)

    def _add_output(self, parameter: nn.Parameter, use: Use, gradient: Tensor, by: float) -> None:
        if parameter not in self.outputs:
            *experts, first, last = parameter.shape
            width = first if use.axis == -1 else last
            shape = [*experts, width] if width > WIDEST else [*experts, width, width]
            self.outputs[parameter] = torch.zeros(shape, device=gradient.device)
        add_moment(self.outputs[parameter], gradient, Use(offsets=use.offsets), by)

    # -- the sums ---------------------------------------------------------------------------------

    def sizes(self) -> dict[tuple[str, nn.Parameter], float]:
        """Return the root mean square of every sum, by its role and (first) weight."""
        totals = {("inputs", g.leader): g.total for g in self.groups.values()}
        totals |= {("outputs", p): total for p, total in self.outputs.items()}
        return {key: rms(total) for key, total in totals.items() if total is not None}

    def finish(self) -> None:
        """Make all matrices symmetric.

        Raises:
            MeasureError: a sum is not finite.
        """
        for group in set(self.groups.values()):
            if group.total is not None:
                self._finish(group.total, group.leader, is_matrix=not group.use.is_lookup)
        for parameter, total in self.outputs.items():
            self._finish(total, parameter, is_matrix=total.dim() == parameter.dim())

    def _finish(self, total: Tensor, parameter: nn.Parameter, *, is_matrix: bool) -> None:
        if is_matrix:
            fill_lower(total)
        if not total.isfinite().all():
            raise MeasureError(
                f"what {self.parameters[parameter]} gets, or its gradient, is not finite. Look for "
                "NaN in the weights, or measure in float32 (`dtype: float32`)."
            )
