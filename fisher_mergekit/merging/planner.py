"""The one place that touches mergekit's planner: record its walk, check, build the tasks."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from mergekit.config import ConfigReader, MergeConfiguration
from mergekit.graph import Task
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

from fisher_mergekit.errors import PlanningError, RecipeError
from fisher_mergekit.merging import checks, exclude, settings, sidecars, slots
from fisher_mergekit.merging.settings import TensorSettings
from fisher_mergekit.merging.sidecars import ModelSidecar
from fisher_mergekit.merging.slots import Record, Slot, Source
from fisher_mergekit.merging.tasks import CopyTask, LoadPrecision, LoadTheta, MergeTask
from fisher_mergekit.methods import METHODS
from fisher_mergekit.recipe import exclude_patterns

LOG = logging.getLogger(__name__)


def plan(planner: MergePlanner, walk: Callable[[], None]) -> None:
    """Fill `planner._tensors` with the tasks of a recipe of ours.

    Every step adds to one list of problems and the next goes on as far as it can, so that the
    user sees all of them at once.

    Args:
        planner: mergekit's planner, whose recipe names one of our methods.
        walk: mergekit's own `_plan` of this planner.

    Raises:
        PlanningError: everything that is wrong, before any weight is merged.
    """
    config, options = planner.config, planner.options
    method = METHODS[config.merge_method]

    sliced = is_sliced(config)  # before mergekit turns everything into slices
    problems = checks.recipe(config, options)
    patterns: tuple[str, ...] = ()
    try:
        patterns = exclude_patterns(config)
    except RecipeError as error:
        problems.append(error.message)
    try:
        records = record_walk(planner, walk)
    except (RuntimeError, ValueError) as error:
        # What mergekit stumbles over is most likely what we have a better sentence for.
        raise PlanningError(problems or [f"mergekit cannot plan this merge: {error}"]) from error

    files, told = slots.open_files(records)
    problems += told
    outputs = slots.find_slots(records, files, patterns)
    head = checks.task_head([slot.name for slot in outputs], planner.out_model_config)
    problems += checks.tensors(outputs, patterns, config.base_model, files, head)
    if not all(slot.is_complete for slot in outputs):
        problems += [f"{m}: {held.trouble}" for m, held in files.items() if held.trouble]
    if not sliced:
        problems += checks.output_config(outputs, planner.arch_info, planner.out_model_config)
    if not (sliced or problems):
        problems += checks.loads(outputs, planner.out_model_config)

    merged = [slot for slot in outputs if slot.is_merged and slot.is_complete]
    resolved, told = settings.resolve(merged, method, config)
    problems += told
    # `precompute` reads neither slices nor the several recipes of one mergekit-multi file.
    one_by_one = sliced or "mergekit.scripts.multimerge" in sys.modules
    opened, told = sidecars.open_all(
        merged, resolved, config, method.kind, files, one_by_one=one_by_one
    )
    problems += told
    for model, found in opened.items() if not problems else ():
        problems += checks.left_out(
            files[model],
            model.config(options.trust_remote_code),
            found.sidecar,
            planner.arch_info,
            planner.out_model_config,
        )
    if problems:
        raise PlanningError(list(dict.fromkeys(problems)))

    if any(slot.is_merged and len(slot.sources) > 1 for slot in outputs if slot.name in head):
        LOG.warning(
            "The task head is merged too (%s), which makes sense only for models of one task and "
            "the same labels. %s",
            ", ".join(head),
            exclude.advice(
                head,
                [slot.name for slot in outputs],
                patterns,
                head,
                has_base=config.base_model is not None,
            ),
        )
    planner._tensors.extend(
        (slot.weight, _task(slot, resolved.get(slot.name), opened, config, options))
        for slot in outputs
    )


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
        records.append(Record(weight, tuple(weights_in), tuple(models), cfg_reader))

    config = planner.config
    base_model, config.base_model = config.base_model, None
    try:
        planner.normalize_config()
    finally:
        config.base_model = base_model
    planner.plan_tensor = note
    try:
        walk()
    finally:
        del planner.plan_tensor
    return records


def _task(
    slot: Slot,
    values: TensorSettings | None,
    opened: Mapping[ModelReference, ModelSidecar],
    config: MergeConfiguration,
    options: MergeOptions,
) -> Task[Any]:
    """Return the task that makes one output tensor; `values` is None if it is not merged."""
    # Cast once: to what is written, not to what mergekit would have computed in.
    dtype = slot.weight.force_dtype or config.out_dtype or config.dtype

    def theta(source: Source) -> LoadTheta:
        return LoadTheta(
            model=source.model,
            name=source.tensor.name,
            parts=_parts(source),
            label=slot.name,
            device=options.device if options.read_to_gpu else None,
        )

    if values is None:
        if not slot.is_floating:
            dtype = slot.weight.force_dtype
        return CopyTask(name=slot.name, theta=theta(slot.sources[0]), dtype=dtype)

    parts = [slot.sources[i] for i in values.counting]
    lambdas = tuple(values.lambdas[i] for i in values.counting)
    thetas = tuple(map(theta, parts))
    measured = [opened[part.model] for part in parts]
    if not measured[0].describes(parts[0].tensor):
        return MergeTask(name=slot.name, thetas=thetas, lambdas=lambdas, dtype=dtype)
    return MergeTask(
        name=slot.name,
        thetas=thetas,
        lambdas=lambdas,
        precisions=tuple(
            LoadPrecision(
                model=part.model,
                path=found.sidecar.path,
                kind=found.sidecar.kind,
                name=part.tensor.name,
                parts=_parts(part),
                label=slot.name,
            )
            for part, found in zip(parts, measured, strict=True)
        ),
        scales=tuple(found.scale for found in measured),
        normalize=values.options["normalize_fishers"],
        floor=values.options["floor"],
        favor=values.counting.index(values.favored) if values.favored in values.counting else None,
        dtype=dtype,
    )


def _parts(source: Source) -> tuple[str, ...]:
    """Return the names in the files of what is converted, or nothing for a tensor as it is."""
    return tuple(part.name for part in source.tensor.parts) if source.tensor.group else ()
