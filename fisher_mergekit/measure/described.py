"""What kinds of linear layers have in common: a model's factors, by the names in its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fisher_mergekit.measure.dividing import Part, divided
from fisher_mergekit.measure.factors import Group
from fisher_mergekit.measure.kinds import Measured, Stored
from fisher_mergekit.sidecar.header import Factors as FactorNames
from fisher_mergekit.sidecar.layout import Group as LayoutGroup


def described(
    kind: str,
    measured: Measured,
    scaled: Callable[[Group], Tensor],
    *,
    outputs: bool = False,
) -> Stored:
    """Return the factors of every weight in the files that linear layers have.

    Args:
        scaled: makes a group's stored input factor of its sums.
        outputs: whether output factors are stored too, as means over examples.
    """
    factors = measured.factors
    assert factors is not None
    parameters = dict(measured.subject.model.named_parameters(remove_duplicate=False))
    inputs: dict[Group, Tensor] = {}
    names: dict[object, str] = {}
    found = Stored()

    def store(name: str, part: Part, factor: Tensor, axis: int, *, is_matrix: bool) -> None:
        found.tensors[name] = part.of(factor, axis, is_matrix=is_matrix)
        if is_matrix:
            found.matrices.append(name)

    for group in measured.subject.groups:
        try:
            parts = _parts(group, parameters, measured, kind)
        except ValueError as error:
            found.undescribed |= dict.fromkeys((s.name for s in group.sources), str(error))
            continue
        for part in parts:
            parameter = parameters[part.target]
            own, use = factors.groups[parameter], factors.uses[parameter]
            if own not in inputs:
                inputs[own] = scaled(own).to("cpu")
            key = (own, part.experts, part.experts and part.indices(use.axis))
            if key not in names:
                names[key] = f"{part.source}.inputs"
                store(names[key], part, inputs[own], use.axis, is_matrix=not use.is_lookup)
            axis = part.axis(use.axis)
            record = FactorNames(inputs=names[key], input_axis=-1 if axis == -1 else -2)
            if outputs:
                total = _output(parameter, measured)
                record = record.model_copy(update={"outputs": f"{part.source}.outputs"})
                is_matrix = total.dim() == parameter.dim()
                store(record.names[1], part, total, -3 - use.axis, is_matrix=is_matrix)
            found.weights.append(part.source)
            found.factors[part.source] = record
    return found


def _parts(
    group: LayoutGroup, parameters: Mapping[str, nn.Parameter], measured: Measured, kind: str
) -> list[Part]:
    """Return the parts of a group; ValueError with half a sentence why it is not described."""
    if all(_is_measured(parameters[name], measured) for name in group.targets):
        return divided(group)
    raise ValueError(f"not described by {kind}")


def _is_measured(parameter: nn.Parameter, measured: Measured) -> bool:
    assert measured.factors is not None
    group = measured.factors.groups.get(parameter)
    return group is not None and group.total is not None


def _output(parameter: nn.Parameter, measured: Measured) -> Tensor:
    """Return a weight's mean output factor, on the CPU; zero where no gradient came."""
    assert measured.factors is not None
    total = measured.factors.outputs.get(parameter)
    if total is None:
        width = parameter.shape[-3 - measured.factors.uses[parameter].axis]
        return torch.zeros(*parameter.shape[:-2], width, width)
    return total.to("cpu") / measured.examples
