"""What is wrong with a merge: pure functions that return problems, one sentence or two each.

Nothing here raises, so that one planning can tell everything at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from mergekit.architecture import ModelArchitecture
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from fisher_mergekit.errors import CheckpointError, nearest, some
from fisher_mergekit.merging import exclude, output
from fisher_mergekit.merging.files import Files
from fisher_mergekit.merging.slots import Slot, without
from fisher_mergekit.merging.vocabulary import Vocabulary
from fisher_mergekit.recipe import slices_of

_LAYER = re.compile(r"\.\d+(?=\.)")


def walk(config: MergeConfiguration, architecture: ModelArchitecture) -> list[str]:
    """Check that there is a way through modules and layers, which mergekit takes as it is told."""
    known = list(architecture.modules)
    problems = [
        f"`modules:` names {name!r}, but a model of this kind has {', '.join(known)} for mergekit."
        f"{nearest(name, known)}"
        for name in config.modules or {}
        if name not in known
    ]
    absent = [name for name in known if config.modules and name not in config.modules]
    if absent and not problems:
        problems.append(
            f"`modules:` says nothing of {', '.join(absent)}, so the merged model would lack it; "
            f"mergekit has {', '.join(known)} in a model of this kind. Add what is missing, with "
            "`models:` to merge all of it."
        )
    pieces = slices_of(config)
    problems += [
        f"layer_range [{start}, {stop}] of {source.model}: it goes from the first layer, counted "
        "from 0, to the one behind the last."
        for source in (source for piece in pieces for source in piece.sources)
        for start, stop in [source.layer_range]
        if not 0 <= start <= stop
    ]
    ranges = [source.layer_range for piece in config.slices or [] for source in piece.sources]
    if ranges and all(start == stop for start, stop in ranges):
        problems.append("the slices make no layer at all; give one of them a longer `layer_range`.")
    return problems


def tensors(
    slots: Sequence[Slot],
    patterns: Sequence[str],
    base: ModelReference | None,
    files: Files,
    head: Sequence[str],
    tokens: Vocabulary,
) -> list[str]:
    """Check that every output tensor can be made: all parts there, alike, and of a known kind.

    Args:
        slots: all output tensors.
        patterns: the recipe's `exclude`.
        base: the recipe's `base_model`.
        files: every model's tensors.
        head: names of the output tensors of a task head.
        tokens: what becomes of the tables of tokens.
    """

    def remedy(offenders: Sequence[Slot]) -> str:
        """Return the `exclude:` line, where that makes sense and base_model has the tensors."""
        if 2 * len(offenders) > len(slots):
            return "That is most of the model; merge models of one architecture and size."
        lost = [s.name for s in offenders if base in files and files[base].find(s.weight) is None]
        if lost:
            return (
                f"base_model {base} itself lacks {some(lost)}; name as `base_model:` a model "
                "that has what the others lack, and add that to `exclude:`."
            )
        return exclude.advice(
            [s.name for s in offenders],
            [s.name for s in slots],
            patterns,
            head,
            has_base=base is not None,
        )

    problems = _not_in_base(slots)

    merged = [s for s in slots if not s.excluded]
    if slots and not any(slot.is_floating for slot in merged):
        problems.append(
            "`exclude:` keeps every tensor out, so that nothing is left to merge. Exclude only the "
            "task heads."
        )
    problems += _computed(merged)
    unknown = [s for s in merged if s.sources and not _is_anywhere(s, base, files)]
    if unknown:
        asked = [s.sources[0].weight.name for s in unknown]  # in a slice not the output's name
        problems.append(
            f"mergekit expects {some(asked)} in a model of this architecture, and no model "
            "has it. Either a `layer_range` goes beyond the last layer, or mergekit does not know "
            "these models well enough to merge them."
        )
    missing = [s for s in merged if s not in unknown and not s.is_complete]
    if missing:
        problems.append(
            f"not every model has every tensor: {_absentees(missing)}. {remedy(missing)}"
        )

    complete = [s for s in merged if s.sources and s.is_complete]
    reshaped = [s for s in complete if len({s.sizes(x.tensor.shape) for x in s.sources}) > 1]
    vocabulary = [s for s in reshaped if _differs_in_vocabulary(s)]
    if vocabulary:
        problems.append(
            f"the models' vocabularies differ: {vocabulary[0].shapes}. Align them by their "
            "tokens: write at the top `tokenizer_source: union` (or `base`, which drops tokens "
            "that base_model lacks)."
        )
    different = [s for s in reshaped if s not in vocabulary]
    if different:
        shapes = "; ".join(slot.shapes for slot in different[:4]) + (
            "; …" if len(different) > 4 else ""
        )
        problems.append(f"tensors differ in shape: {shapes}. {remedy(different)}")
    alike = [s for s in complete if s not in reshaped]
    if base in files:
        problems += output.unlike_base(alike, base, files, tokens)
    elif base is None and tokens.is_cut:
        problems += output.cut_for_nobody(complete)
    problems += _odd_dtypes(alike)
    unequal = [s for s in alike if not s.is_floating and _is_unequal(s)]
    if unequal:
        problems.append(
            f"buffers that are no floating-point numbers differ between the models: "
            f"{some([s.name for s in unequal])}. {remedy(unequal)}"
        )
    return problems


def _is_anywhere(slot: Slot, base: ModelReference | None, files: Files) -> bool:
    """Whether a source or base_model has the tensor."""
    in_base = base in files and files[base].find(slot.weight) is not None
    return in_base or any(source.stored is not None for source in slot.sources)


def _not_in_base(slots: Iterable[Slot]) -> list[str]:
    lost = [s for s in slots if s.excluded and s.sources and not s.is_complete]
    if not lost:
        return []
    return [
        f"excluded tensors come from base_model, but {lost[0].sources[0].model} lacks "
        f"{some([s.name for s in lost])}. Name as `base_model:` the model that has them."
    ]


def _computed(slots: Iterable[Slot]) -> list[str]:
    """Find tensors that transformers computes while loading, rather than only moving numbers.

    Layers are alike, so of each kind of tensor one is looked at.
    """
    problems: dict[tuple[ModelReference, str], str | None] = {}
    for source in (source for slot in slots for source in slot.sources):
        group = source.stored.group if source.stored is not None else None
        if group is None or not source.is_made:
            continue
        key = (source.model, _LAYER.sub(".N", source.tensor.name))
        if key not in problems:
            problems[key] = None
            try:
                group.places()
            except CheckpointError as error:
                problems[key] = f"{source.model}: {error.message}"
    return [problem for problem in problems.values() if problem is not None]


def _absentees(slots: Iterable[Slot]) -> str:
    names: dict[str, list[str]] = {}
    for slot in slots:
        for source in slot.sources:
            if source.stored is None:
                names.setdefault(str(source.model), []).append(source.weight.name)
    return "; ".join(f"{model} lacks {some(found)}" for model, found in names.items())


def _differs_in_vocabulary(slot: Slot) -> bool:
    axis = slot.weight.vocabulary_axis
    if axis is None or slot.aligned:
        return False
    return len({without(source.tensor.shape, axis) for source in slot.sources}) == 1


def _is_unequal(slot: Slot) -> bool:
    first, *others = (source.tensor for source in slot.sources)
    return any(o.dtype != first.dtype or o.digest() != first.digest() for o in others)


def _odd_dtypes(slots: Iterable[Slot]) -> list[str]:
    """Find weights that are quantised, or floating in one model and not in another."""
    odd: dict[tuple[str, str], list[str]] = {}
    for slot in slots:
        quantised = any(source.tensor.dtype.startswith("F8") for source in slot.sources)
        for source in slot.sources:
            if not source.tensor.is_floating and (quantised or slot.is_floating):
                key = (str(source.model), source.tensor.dtype)
                odd.setdefault(key, []).append(source.tensor.name)
    return [
        f"{model}: {some(names)} is stored as {dtype}, which cannot be averaged. Save the model "
        "again as float32, bfloat16 or float16."
        for (model, dtype), names in odd.items()
    ]
