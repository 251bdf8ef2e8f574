"""The recipe's settings for one output tensor, as numbers.

mergekit's own resolver is used throughout, so that a number, a layer gradient and a list of
filters mean here what they mean in every recipe.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit.config import ConfigReader, MergeConfiguration
from mergekit.merge_methods.base import ParameterSpec
from mergekit.parameter_resolver import resolve_parameter
from pydantic import ValidationError

from fisher_mergekit.errors import some
from fisher_mergekit.merging.method import LAMBDA, WEIGHT, method_parameter
from fisher_mergekit.merging.slots import Slot, Source
from fisher_mergekit.methods import Method, MethodParameter
from fisher_mergekit.recipe import parameter_blocks


@dataclass(frozen=True)
class TensorSettings:
    """What the recipe says about one merged tensor.

    Attributes:
        lambdas: one a source, in the slot's order.
        options: the method's own parameters, by name.
        favored: index of the source that gets all of the floor, if `favor_base` says so.
    """

    lambdas: tuple[float, ...]
    options: Mapping[str, Any]
    favored: int | None

    @property
    def counting(self) -> list[int]:
        """Indices of the sources that have any weight; the others need not even be read."""
        favored = self.favored if self.options.get("floor") else None
        return [i for i, value in enumerate(self.lambdas) if value > 0 or i == favored]


def resolve(
    merged: Sequence[Slot], row: Method, config: MergeConfiguration
) -> tuple[dict[str, TensorSettings], list[str]]:
    """Resolve the settings of every merged tensor.

    Returns:
        The settings by the output tensor's name, with defaults where the recipe's are wrong; and
        what is wrong, each kind of mistake once a model.
    """
    spelling = WEIGHT if any("weight" in b.parameters for b in parameter_blocks(config)) else LAMBDA
    problems: dict[object, str] = {}
    resolved: dict[str, TensorSettings] = {}
    zero: list[str] = []
    for slot in merged:
        lambdas = []
        for source in slot.sources:
            value, problem = _lambda(spelling, slot.reader, source)
            if problem:
                problems.setdefault(source.model, problem)
            lambdas.append(value)
        if not any(lambdas):
            zero.append(slot.name)
            lambdas = [1.0] * len(lambdas)
        options = {}
        for parameter in row.parameters:
            options[parameter.name], problem = _shared(parameter, slot.reader, slot.name)
            if problem:
                problems.setdefault(parameter.name, problem)
        favored = None
        if options.get("favor_base"):
            models = [source.model for source in slot.sources]
            base = slot.reader.base_model
            if base in models:
                favored = models.index(base)
            else:
                problems.setdefault(
                    "favored",
                    f"`favor_base: true` needs base_model among the merged models; for {slot.name} "
                    f"it is not: {base} is none of {', '.join(map(str, models))}. List it under "
                    "`models:`, in the same spelling, or remove `favor_base`.",
                )
        resolved[slot.name] = TensorSettings(tuple(lambdas), options, favored)
    if zero:
        problems["zero"] = (
            f"every model's {spelling.name} is 0 for {some(zero, 1)}, so nothing is left to merge "
            "there. Make one of them positive, or keep the tensor out with `exclude:`."
        )
    return resolved, list(problems.values())


def _lambda(spec: ParameterSpec, reader: ConfigReader, source: Source) -> tuple[float, str | None]:
    # By the source's name, as mergekit resolves what belongs to an input.
    model, tensor = source.model, source.weight.name
    where = f"{spec.name} of {model}"
    try:
        value = resolve_parameter(
            spec,
            reader.parameter_sources(model),
            tensor_name=tensor,
            t=reader.t,
            model=model,
        )
    except ValidationError as error:
        return 1.0, _not_a(where, "a number", error)
    if value is None:
        return 1.0, None
    if not math.isfinite(value) or value < 0:
        return 1.0, f"{where} is {value} for {tensor}; it must be a finite number, 0 or more."
    return float(value), None


def _shared(
    parameter: MethodParameter, reader: ConfigReader, tensor: str
) -> tuple[Any, str | None]:
    where = f"parameters: {parameter.name}"
    try:
        value = resolve_parameter(
            method_parameter(parameter),
            reader.parameter_sources(None),
            tensor_name=tensor,
            t=reader.t,
        )
    except ValidationError as error:
        return parameter.default, _not_a(where, _wanted(parameter), error)
    if parameter.choices and value not in parameter.choices:
        return parameter.default, f"{where}: expected {_wanted(parameter)}, got {value!r}."
    if parameter.value_type in (int, float):
        least, most = parameter.least, parameter.most
        if not (math.isfinite(value) and least <= value <= most):
            limits = f"{least:g} or more" if most == math.inf else f"from {least:g} to {most:g}"
            return parameter.default, f"{where} is {value}; it must be a finite number, {limits}."
    return value, None


def _wanted(parameter: MethodParameter) -> str:
    if parameter.choices:
        return " or ".join(map(repr, parameter.choices))
    return {bool: "true or false", int: "a whole number"}.get(parameter.value_type, "a number")


def _not_a(where: str, wanted: str, error: ValidationError) -> str:
    return f"{where}: expected {wanted}, got {error.errors()[0]['input']!r}."
