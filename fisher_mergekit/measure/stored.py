"""What a sidecar holds of a kind: what was measured for it, by the names in the model's files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fisher_mergekit.measure.dividing import Part, divided
from fisher_mergekit.measure.factors import Factors
from fisher_mergekit.measure.measured import Measured
from fisher_mergekit.precision import kind_for
from fisher_mergekit.precision.statistics import INPUTS, OUTPUTS, Statistics
from fisher_mergekit.sidecar.header import NOT_DESCRIBED, FactorNames


@dataclass
class Content:
    """What a sidecar holds of one kind.

    Attributes:
        tensors: by the names under which they are stored, on the CPU.
        matrices: names of those that are symmetric matrices.
        weights: the weights in the files that they describe.
        factors: by weight, which tensors are its factors; empty for a tensor a weight.
        undescribed: other weights in the files, and why nothing is stored of them.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    matrices: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    factors: dict[str, FactorNames] = field(default_factory=dict)
    undescribed: dict[str, str] = field(default_factory=dict)


def stored(kind: str, measured: Measured) -> Content:
    """Return what is written, in float32; what no later kind needs may be taken out."""
    statistics = kind_for(kind).STATISTICS
    return _squares(measured) if statistics.squares else _factors(kind, measured, statistics)


def _squares(measured: Measured) -> Content:
    """Return the squares under the names, and in the shapes, that the files have."""
    on_disk = measured.subject.on_disk(measured.squares)
    tensors = {name: tensor.to("cpu") for name, tensor in on_disk}
    return Content(tensors, weights=list(tensors))


def _factors(kind: str, measured: Measured, statistics: Statistics) -> Content:
    """Return the factors of every weight in the files that linear layers have.

    An input factor is stored once for all weights that share it.
    """
    assert measured.factors is not None
    parameters = dict(measured.subject.model.named_parameters(remove_duplicate=False))
    factors, means = measured.factors, _Means(measured, parameters, statistics)
    names: dict[object, str] = {}
    found = Content()

    def store(
        name: str, owner: object, part: Part, factor: Tensor, axis: int, *, is_matrix: bool
    ) -> str:
        """Store a part's factor along an axis, unless it is stored already; return its name."""
        key = (owner, part.experts, part.experts and part.indices(axis))
        if key not in names:
            names[key] = name
            found.tensors[name] = part.of(factor, axis, is_matrix=is_matrix)
            if is_matrix:
                found.matrices.append(name)
        return names[key]

    for group in measured.subject.groups:
        owners = [parameters[name] for name in group.targets]
        try:
            if not means.available.issuperset(owners):
                raise ValueError(NOT_DESCRIBED + kind)
            parts = divided(group)
        except ValueError as error:
            found.undescribed |= dict.fromkeys((s.name for s in group.sources), str(error))
            parts = []
        for part in parts:
            source, parameter = part.source, parameters[part.target]
            own, use = factors.groups[parameter], factors.uses[parameter]
            total, axis = means.inputs(parameter), use.axis
            name = f"{source}.inputs"
            name = store(name, own, part, total, axis, is_matrix=not use.is_lookup)
            record = FactorNames(inputs=name, input_axis=-1 if part.axis(axis) == -1 else -2)
            if statistics.outputs:
                total, axis = means.outputs(parameter), -3 - use.axis
                name, is_matrix = f"{source}.outputs", total.dim() == parameter.dim()
                name = store(name, parameter, part, total, axis, is_matrix=is_matrix)
                record = record.model_copy(update={"outputs": name})
            found.weights.append(source)
            found.factors[source] = record
        means.release(owners)
    return found


class _Means:
    """Means of a model's sums, on the CPU.

    A sum becomes its mean in place, and is given up after its last use, unless another kind needs
    it: matrices do not stand in memory twice.

    Attributes:
        available: the weights that have any.
    """

    def __init__(
        self, measured: Measured, parameters: Mapping[str, nn.Parameter], statistics: Statistics
    ):
        assert measured.factors is not None
        self._factors: Factors = measured.factors
        self._measured = measured
        self._over = statistics.inputs
        groups = self._factors.groups
        self.available = {p for p, group in groups.items() if group.total is not None}
        self._made: dict[object, Tensor] = {}
        self._left = Counter[object]()
        for group in measured.subject.groups:
            self._count([parameters[name] for name in group.targets], 1)

    def inputs(self, parameter: nn.Parameter) -> Tensor:
        """Return a weight's input factor, the same tensor for all that share it."""
        group = self._factors.groups[parameter]
        if group not in self._made:
            assert group.total is not None
            divisor: Tensor | float = self._measured.examples
            if self._over == "rows":
                assert group.rows is not None
                # An expert that got none has zeros to divide.
                rows = group.rows.clamp_min(1).to(group.total.device, group.total.dtype)
                divisor = rows.reshape(*rows.shape, *[1] * (group.total.dim() - rows.dim()))
            self._made[group] = self._mean(group.total, divisor, INPUTS)
            if INPUTS not in self._measured.later:
                group.total = None
        return self._made[group]

    def outputs(self, parameter: nn.Parameter) -> Tensor:
        """Return a weight's output factor; zero where no gradient came."""
        if parameter not in self._made:
            total = self._factors.outputs.get(parameter)
            if total is None:
                width = parameter.shape[-3 - self._factors.uses[parameter].axis]
                total = torch.zeros(*parameter.shape[:-2], width, width)
            self._made[parameter] = self._mean(total, self._measured.examples, OUTPUTS)
            if OUTPUTS not in self._measured.later:
                self._factors.outputs.pop(parameter, None)
        return self._made[parameter]

    def release(self, parameters: list[nn.Parameter]) -> None:
        """Give up what was used for the last time."""
        for key in self._count(parameters, -1):
            if not self._left[key]:
                self._made.pop(key, None)

    def _count(self, parameters: list[nn.Parameter], by: int) -> list[object]:
        groups = [self._factors.groups[p] for p in parameters if p in self.available]
        keys: list[object] = [*parameters, *groups]
        for key in keys:
            self._left[key] += by
        return keys

    def _mean(self, total: Tensor, divisor: Tensor | float, need: str) -> Tensor:
        mean = total / divisor if need in self._measured.later else total.div_(divisor)
        return mean.to("cpu")
