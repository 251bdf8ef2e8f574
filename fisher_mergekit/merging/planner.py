"""What planning does instead of mergekit: record its walk, check, build the tasks."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

from mergekit.architecture import WeightInfo, arch_info_for_config
from mergekit.config import MergeConfiguration
from mergekit.plan import MergePlanner

from fisher_mergekit.errors import PlanningError, Problems
from fisher_mergekit.merging import (
    card,
    checks,
    command,
    depth,
    exclude,
    output,
    planned,
    priors,
    settings,
    sidecars,
    slots,
    vocabulary,
)
from fisher_mergekit.merging.build import Builder
from fisher_mergekit.merging.files import Files
from fisher_mergekit.merging.pieces import with_pieces
from fisher_mergekit.merging.remedies import Remedies
from fisher_mergekit.merging.settings import TensorSettings
from fisher_mergekit.merging.sidecars import PRIOR_KIND
from fisher_mergekit.merging.slots import Slot, by_model, part_names
from fisher_mergekit.merging.walk import is_sliced, record_walk
from fisher_mergekit.merging.ways import (
    Decision,
    choose,
    counting_models,
    is_weighed,
    keys_tried,
    scales_of,
)
from fisher_mergekit.methods import ALLOW_MIXED, METHODS
from fisher_mergekit.recipe import exclude_patterns, recipe_problems
from fisher_mergekit.sidecar.layout import text_of

LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def _nothing_collected() -> Iterator[None]:
    """Let the garbage collector rest: it would look again and again at all that was ever made."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_nothing_collected()
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
    planned.forget()
    config = planner.config
    describe_by_output(planner)
    sliced = is_sliced(config)  # before mergekit turns everything into slices
    problems = Problems([*command.dropped(), *recipe_problems(config)])
    patterns, _ = exclude_patterns(config)
    stray = checks.walk(config, planner.arch_info)
    if stray:
        raise PlanningError([*problems, *stray])
    try:
        records = record_walk(planner, walk)
    except (RuntimeError, ValueError) as error:
        # What mergekit stumbles over is most likely what we have a better sentence for.
        raise PlanningError(problems or [f"mergekit cannot plan this merge: {error}"]) from error

    files = problems.of(slots.open_files(records))
    tokens = problems.of(vocabulary.find(planner))
    outputs = slots.find_slots(records, files, patterns, aligns=tokens.changes)
    named = [slot.name for slot in outputs] + slots.unwritten(records, outputs, files)
    problems += exclude.unmatched(patterns, named)
    problems += vocabulary.problems_of(outputs, tokens)
    head = output.task_head([slot.name for slot in outputs], planner.out_model_config)
    problems += checks.tensors(outputs, patterns, config.base_model, files, head, tokens)
    if not all(slot.is_complete for slot in outputs):
        problems += [f"{m}: {held.trouble}" for m, held in files.items() if held.trouble]
    problems += (
        depth.settle(config.modules, planner.arch_info, planner.out_model_config, files)
        if sliced
        else output.configuration(outputs, planner.arch_info, planner.out_model_config)
    )
    if not problems:  # so that every row of tokens has its number
        problems += output.loads(outputs, vocabulary.settle(planner, tokens), tokens)

    merged = [slot for slot in outputs if slot.is_merged and slot.is_complete]
    resolved = problems.of(settings.resolve(merged, METHODS[config.merge_method], config))
    decision = problems.of(decide(merged, resolved, config, files))
    if not problems:
        problems += left_out(planner, outputs, decision, files)
    if problems:
        raise PlanningError(list(dict.fromkeys(problems)))

    warn_of_head(head, outputs, patterns, config)
    if code := output.code_left_behind(planner.out_model_config):
        LOG.warning(
            "mergekit does not copy all of the models' own code: put %s, and what is imported "
            "there, into the merge's folder.",
            " and ".join(code),
        )
    if planner.options.write_model_card:
        card.note(config, outputs, decision)
    builder = Builder(decision, config, planner.options, tokens)
    planner._tensors.extend((slot.weight, builder.task(slot)) for slot in outputs)


def describe_by_output(planner: MergePlanner) -> None:
    """Let mixed architectures be described by the output's, as its configuration has it.

    mergekit takes the description of whichever model comes first in a set.
    """
    if planner.options.allow_crimes and planner.arch_info.architectures:
        described = arch_info_for_config(planner.out_model_config)
        planner.arch_info = described or planner.arch_info


def left_out(
    planner: MergePlanner, outputs: Sequence[Slot], decision: Decision, files: Files
) -> list[str]:
    """Say which parameters of the models mergekit would leave out of the merge."""
    kind = METHODS[planner.config.merge_method].kind
    known: dict[str, list[WeightInfo]] = {}  # most models are built alike, and it takes a while
    problems = []
    merged = [slot for slot in outputs if slot.is_merged]
    for model in counting_models(merged, decision.settings):
        held, sidecar = files[model], decision.opened.get((model, kind))
        text = text_of(held.config)
        if text not in known:
            known[text] = planner.arch_info.all_weights(held.config)
        names = held.parameters if sidecar is None else sidecars.parameters(sidecar)
        problems += output.left_out(held, names, known[text], planner.out_model_config)
    return problems


def warn_of_head(
    head: Sequence[str],
    outputs: Sequence[Slot],
    patterns: Sequence[str],
    config: MergeConfiguration,
) -> None:
    """Tell of a task head that is merged like all else, and how to keep it out."""
    shared = [slot.name for slot in outputs if slot.is_merged and len(slot.sources) > 1]
    merged = [name for name in head if name in shared]
    if merged:
        LOG.warning(
            "The task head is merged too (%s), which makes sense only for models of one task and "
            "the same labels. %s",
            ", ".join(merged),
            exclude.advice(
                head,
                [slot.name for slot in outputs],
                patterns,
                head,
                has_base=config.base_model is not None,
            ),
        )


def decide(
    merged: Sequence[Slot],
    resolved: dict[str, TensorSettings],
    config: MergeConfiguration,
    files: Files,
) -> tuple[Decision, list[str]]:
    """Open the sidecars, and choose by which of them each tensor is merged; say what is wrong."""
    method = METHODS[config.merge_method]
    problems = Problems()
    given = problems.of(sidecars.given_paths(config))
    remedies = Remedies(given)
    bases = problems.of(priors.base_sources(merged, resolved, config, files))
    shared = [slot for slot in merged if len(slot.sources) > 1 or slot.name in bases]
    weighed = [slot for slot in shared if is_weighed(slot, resolved[slot.name], bases)]
    tried = {s.name: keys_tried(s, resolved[s.name], method, bases) for s in weighed}
    wanted = dict.fromkeys(chain.from_iterable(chain.from_iterable(tried.values())))
    sources = by_model(source for slot in shared for source in slot.sources)  # all that scales take
    names = {key: part_names(sources[key[0]]) for key in wanted if key[1] != PRIOR_KIND}
    opened = problems.of(sidecars.open_all(names, files, remedies))
    if bases:
        is_listed = any(s.model == config.base_model for slot in merged for s in slot.sources)
        prior = problems.of(priors.open_prior(bases, config, files, remedies, is_listed=is_listed))
        if prior is not None:
            opened[next(iter(bases.values())).model, PRIOR_KIND] = prior
    strict = [slot for slot in weighed if not resolved[slot.name].options.get(ALLOW_MIXED.name)]
    for together in dict.fromkeys(chain.from_iterable(tried[slot.name] for slot in strict)):
        problems += sidecars.mixed({k: opened[k] for k in together if k in opened}, remedies.of_all)
    if not opened.keys() >= wanted.keys():
        return Decision(opened=opened), problems
    pieces: dict[str, tuple[Slot, ...]] = {}
    if any(sidecar.measurement.factors for sidecar in opened.values()):
        pieces = with_pieces(weighed)
        shared = [piece for slot in shared for piece in pieces.get(slot.name, (slot,))]
        resolved |= {p.name: resolved[name] for name, made in pieces.items() for p in made}
    ways, told = choose(shared, resolved, method, opened, remedies, bases)
    scales = {} if told else scales_of(shared, ways, opened)
    return Decision(ways, resolved, scales, pieces, opened), [*problems, *told]
