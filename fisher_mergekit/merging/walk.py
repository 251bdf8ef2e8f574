"""mergekit's own walk over modules, slices and layers, recorded instead of turned into tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from mergekit.config import ConfigReader, MergeConfiguration
from mergekit.plan import MergePlanner


@dataclass(frozen=True)
class Record:
    """One call of mergekit's `plan_tensor`: an output tensor, and what the models call it.

    Attributes:
        adds_base: whether mergekit would have added base_model, if it is none of the models.
    """

    weight: WeightInfo
    weights_in: tuple[WeightInfo, ...]
    models: tuple[ModelReference, ...]
    reader: ConfigReader
    adds_base: bool = False


def is_sliced(config: MergeConfiguration) -> bool:
    """Whether the recipe says which layers go where, rather than merging like with like."""
    return bool(config.slices) or any(m.slices for m in (config.modules or {}).values())


def record_walk(planner: MergePlanner, walk: Callable[[], None]) -> list[Record]:
    """Let mergekit walk over modules, slices and layers, and note every tensor it comes to.

    An unlisted base_model is not among the models: mergekit's `normalize_config` would append it
    to the inputs, so the recipe is brought into normal form before, while no base_model is seen.
    """
    records: list[Record] = []

    def note(
        weight: WeightInfo,
        weights_in: Sequence[WeightInfo],
        models: Sequence[ModelReference],
        cfg_reader: ConfigReader,
    ) -> None:
        if len(weights_in) != len(models):
            # mergekit 0.1.5 counts the first slice's models for weights after the last layer;
            # they all bear the output's name there.
            weights_in = [weight] * len(models)
        adds_base = any(cfg_reader.module is module for module in listing)
        records.append(Record(weight, tuple(weights_in), tuple(models), cfg_reader, adds_base))

    config = planner.config
    listed = [name for name, module in (config.modules or {}).items() if module.models]
    if config.models:
        listed = list(planner.arch_info.modules)
    base_model, config.base_model = config.base_model, None
    try:
        planner.normalize_config()
    finally:
        config.base_model = base_model
    listing = [config.modules[name] for name in listed]
    planner.plan_tensor = note
    try:
        walk()
    finally:
        del planner.plan_tensor
    return records
