"""What is wrong with a merge: pure functions that return problems, one sentence or two each.

Nothing here raises, so that one planning can tell everything at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import transformers
from mergekit.architecture import ModelArchitecture
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration, OutputSliceDefinition
from mergekit.options import MergeOptions

from fisher_mergekit.errors import CheckpointError
from fisher_mergekit.merging import exclude
from fisher_mergekit.merging.files import Files, ModelFiles
from fisher_mergekit.merging.slots import Slot
from fisher_mergekit.recipe import parameter_problems
from fisher_mergekit.sidecar.checkpoint import TensorInfo
from fisher_mergekit.sidecar.layout import Layout, skeleton

DTYPES = ("float32", "float16", "bfloat16", "float64")
"""What a merge can be written in."""

TASK_CLASSES = (
    "Classification",
    "MultipleChoice",
    "NextSentencePrediction",
    "ObjectDetection",
    "QuestionAnswering",
    "Segmentation",
)
"""Endings of `transformers` classes whose head belongs to one task; a language model's does not."""

_LAYER = re.compile(r"\.\d+(?=\.)")


def recipe(config: MergeConfiguration, options: MergeOptions) -> list[str]:
    """Check what can be seen in the recipe alone; `config` is as the user wrote it."""
    name = config.merge_method
    problems = parameter_problems(config)
    for models in _model_lists(config):
        problems += [
            f"{model} is listed twice in one merge; list it once, with the sum of its lambdas."
            for model in _repeated(models)
        ]
    problems += [
        f"{model} is twice in one slice, and mergekit tells inputs apart by their names only. To "
        "merge layers of one model with each other, spell its folder in two ways: "
        f"{model} and {str(model).rstrip('/')}/."
        for piece in _slices(config)
        for model in _repeated([source.model for source in piece.sources])
    ]
    if config.tokenizer_source is not None or config.tokenizer is not None:
        key = "tokenizer" if config.tokenizer is not None else "tokenizer_source"
        problems.append(
            f"`{key}:` aligns the models' vocabularies; {name} cannot align the measured "
            f"statistics with them yet. Remove `{key}:`; models that share a tokenizer do not "
            "need it."
        )
    for key in ("dtype", "out_dtype"):
        problems += _dtype_problems(key, getattr(config, key))
    if (config.parameters or {}).get("exclude") and config.base_model is None:
        problems.append(
            "`exclude:` takes the excluded tensors from base_model, and the recipe names none. "
            "Add `base_model:` at the top."
        )
    if options.unsafe_truncate_embeddings:
        problems.append(
            f"--unsafe-truncate-embeddings: {name} cannot truncate the measured statistics yet. "
            "Leave it out and merge models of one vocabulary."
        )
    return problems


def _model_lists(config: MergeConfiguration) -> list[list[ModelReference]]:
    lists = [config.models, *(module.models for module in (config.modules or {}).values())]
    return [[entry.model for entry in models] for models in lists if models]


def _slices(config: MergeConfiguration) -> list[OutputSliceDefinition]:
    slices = list(config.slices or [])
    return [*slices, *(s for m in (config.modules or {}).values() for s in m.slices or ())]


def _repeated(models: Sequence[ModelReference]) -> list[str]:
    return sorted({str(model) for model in models if models.count(model) > 1})


def _dtype_problems(key: str, name: str | None) -> list[str]:
    # mergekit also reads torch.float32, and writes a config.json that transformers cannot load.
    if name is None or name in DTYPES:
        return []
    return [f"{key}: {name!r} is not one of {', '.join(DTYPES)}."]


def tensors(
    slots: Sequence[Slot],
    patterns: Sequence[str],
    base: ModelReference | None,
    files: Files,
    head: Sequence[str],
) -> list[str]:
    """Check that every output tensor can be made: all parts there, alike, and of a known kind.

    Args:
        slots: all output tensors.
        patterns: the recipe's `exclude`.
        base: the recipe's `base_model`.
        files: every model's tensors.
        head: names of the output tensors of a task head.
    """

    def remedy(offenders: Sequence[Slot]) -> str:
        """Return the `exclude:` line, where that makes sense and base_model has the tensors."""
        if 2 * len(offenders) > len(slots):
            return "That is most of the model; merge models of one architecture and size."
        lost = [s.name for s in offenders if base in files and files[base].find(s.weight) is None]
        if lost:
            return (
                f"base_model {base} itself lacks {_some(lost)}; name as `base_model:` a model "
                "that has what the others lack, and add that to `exclude:`."
            )
        return exclude.advice(
            [s.name for s in offenders],
            [s.name for s in slots],
            patterns,
            head,
            has_base=base is not None,
        )

    problems = exclude.unmatched(patterns, [slot.name for slot in slots])
    problems += _not_in_base(slots)

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
            f"mergekit expects {_some(asked)} in a model of this architecture, and no model "
            "has it. Either a `layer_range` goes beyond the last layer, or mergekit does not know "
            "these models well enough to merge them."
        )
    missing = [s for s in merged if s not in unknown and not s.is_complete]
    if missing:
        problems.append(
            f"not every model has every tensor: {_absentees(missing)}. {remedy(missing)}"
        )

    complete = [s for s in merged if s.sources and s.is_complete]
    reshaped = [s for s in complete if len({source.tensor.shape for source in s.sources}) > 1]
    vocabulary = [s for s in reshaped if _differs_in_vocabulary(s)]
    if vocabulary:
        problems.append(
            f"the models' vocabularies differ: {_shapes(vocabulary[0])}. The measured statistics "
            "cannot be aligned with a common vocabulary yet; merge models of one vocabulary."
        )
    different = [s for s in reshaped if s not in vocabulary]
    if different:
        shapes = "; ".join(map(_shapes, different[:4])) + ("; …" if len(different) > 4 else "")
        problems.append(f"tensors differ in shape: {shapes}. {remedy(different)}")
    if base in files:
        problems += _unlike_base([s for s in complete if s not in reshaped], base, files)

    alike = [s for s in complete if s not in reshaped]
    problems += _odd_dtypes(alike)
    unequal = [s for s in alike if not s.is_floating and _is_unequal(s)]
    if unequal:
        problems.append(
            f"buffers that are no floating-point numbers differ between the models: "
            f"{_some([s.name for s in unequal])}. {remedy(unequal)}"
        )
    return problems


def output_config(slots: Sequence[Slot], architecture: ModelArchitecture, config: Any) -> list[str]:
    """Check that the merge makes the layers that the output's configuration asks for.

    Args:
        slots: all output tensors.
        architecture: mergekit's description of the models.
        config: the output's `transformers` configuration, which is base_model's.
    """
    asked = {w.name: w.optional for w in architecture.all_weights(config)}
    made = {slot.name for slot in slots}
    lacking = [name for name, optional in asked.items() if name not in made and not optional]
    extra = [name for name in made if name not in asked]
    if not (lacking or extra):
        return []
    which = f"lacks {_some(lacking)}" if lacking else f"also has {_some(sorted(extra))}"
    return [
        "the output's configuration (base_model's) does not fit: by it, the merged model "
        f"{which}. Name as `base_model:` a model with as many layers as the merge."
    ]


def left_out(
    files: ModelFiles,
    config: Any,
    names: Iterable[str],
    architecture: ModelArchitecture,
    output_config: Any,
) -> list[str]:
    """Check that mergekit knows every parameter of a model that is built like the output.

    What it does not know it leaves out in silence, and transformers then draws it at random.

    Args:
        files: the model's.
        config: the model's `transformers` configuration.
        names: the model's measured parameters, by their names in its files.
        architecture: mergekit's description of the models.
        output_config: the output's `transformers` configuration.
    """
    if config.architectures != output_config.architectures:
        return []
    known: set[str] = set()
    for weight in architecture.all_weights(config):
        known |= {weight.name, *(weight.aliases or ()), *(weight.tied_names or ())}
        stored = files.find(weight)
        known |= {part.name for part in stored.parts} if stored is not None else set()
    unknown = [name for name in names if name not in known]
    return [_lacking(unknown, str(files.model))] if unknown else []


def loads(slots: Sequence[Slot], config: Any) -> list[str]:
    """Check that transformers would load the output: every parameter, and nothing converted twice.

    Args:
        slots: all output tensors, complete.
        config: the output's `transformers` configuration.
    """
    names = config.architectures or [""]
    try:
        model = skeleton(config, names[0])
        if model is None:
            return []
        layout = Layout(model, {slot.name: _as_written(slot) for slot in slots if slot.sources})
    except CheckpointError as error:
        return [f"transformers could not load the merged model: {error.message}"]
    made = {name for group in layout.groups for name in group.targets}
    by_name = dict(model.named_parameters(remove_duplicate=False))
    found = {id(parameter) for name, parameter in by_name.items() if name in made}
    lost = [name for name, p in model.named_parameters() if id(p) not in found]
    if lost:
        return [_lacking(lost, names[0])]
    again = {s.name for g in layout.groups if not g.is_plain for s in g.sources}
    twice = [s.name for s in slots if s.name in again and any(x.is_made for x in s.sources)]
    if twice:
        return [
            f"mergekit asks for {_some(twice)} as transformers has it in memory, and writes it "
            "under a name that transformers would convert once more while loading. Save all models "
            "again with one version of transformers."
        ]
    return []


def _as_written(slot: Slot) -> TensorInfo:
    tensor = slot.sources[0].tensor
    return TensorInfo(slot.name, Path(), tensor.dtype, tensor.shape, 0, 0)


def _lacking(names: Sequence[str], of: str) -> str:
    return (
        f"mergekit does not know {_some(names)} of {of}, so the merged model would lack them; it "
        "cannot merge this kind of model."
    )


def task_head(names: Sequence[str], config: Any) -> list[str]:
    """Return which tensors belong to a task head: they lie outside the model's shared body.

    Args:
        names: all output tensors.
        config: the output model's `transformers` configuration.
    """
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if not architecture.endswith(TASK_CLASSES):
        return []
    body = getattr(getattr(transformers, architecture, None), "base_model_prefix", "")
    return [name for name in names if body and not name.startswith(body + ".")]


def _is_anywhere(slot: Slot, base: ModelReference | None, files: Files) -> bool:
    """Whether a source or base_model has the tensor."""
    in_base = base in files and files[base].find(slot.weight) is not None
    return in_base or any(source.stored is not None for source in slot.sources)


def _unlike_base(slots: Iterable[Slot], base: ModelReference, files: Files) -> list[str]:
    """Find tensors that do not fit the output's configuration, which is base_model's."""
    for slot in slots:
        info = files[base].find(slot.weight)
        if info is not None and info.shape != slot.sources[0].tensor.shape:
            return [
                f"the output gets its configuration from base_model {base}, where {slot.name} is "
                f"{list(info.shape)}; merged it is {list(slot.sources[0].tensor.shape)}. Name as "
                "`base_model:` a model of the same sizes."
            ]
    return []


def _not_in_base(slots: Iterable[Slot]) -> list[str]:
    lost = [s for s in slots if s.excluded and s.sources and not s.is_complete]
    if not lost:
        return []
    return [
        f"excluded tensors come from base_model, but {lost[0].sources[0].model} lacks "
        f"{_some([s.name for s in lost])}. Name as `base_model:` the model that has them."
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
    return "; ".join(f"{model} lacks {_some(found)}" for model, found in names.items())


def _differs_in_vocabulary(slot: Slot) -> bool:
    axis = slot.weight.vocabulary_axis
    if axis is None:
        return False
    shapes = [source.tensor.shape for source in slot.sources]
    return len({(*shape[:axis], *shape[axis + 1 :]) for shape in shapes}) == 1


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
        f"{model}: {_some(names)} is stored as {dtype}, which cannot be averaged. Save the model "
        "again as float32, bfloat16 or float16."
        for (model, dtype), names in odd.items()
    ]


def _shapes(slot: Slot) -> str:
    shapes = ", ".join(f"{list(s.tensor.shape)} in {s.model}" for s in slot.sources)
    return f"{slot.name} is {shapes}"


def _some(names: Sequence[str]) -> str:
    """Return the names, or of many the first ones."""
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
