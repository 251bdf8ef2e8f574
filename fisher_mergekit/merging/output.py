"""What is wrong with the model that a merge would write: pure functions that return problems."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import transformers
from mergekit.architecture import ModelArchitecture, WeightInfo
from mergekit.common import ModelReference

from fisher_mergekit.errors import CheckpointError, some
from fisher_mergekit.merging.files import Files, ModelFiles
from fisher_mergekit.merging.slots import Slot
from fisher_mergekit.merging.vocabulary import Vocabulary
from fisher_mergekit.sidecar.checkpoint import TensorInfo
from fisher_mergekit.sidecar.layout import Layout, skeleton

LOG = logging.getLogger(__name__)

TASK_CLASSES = (
    "Classification",
    "MultipleChoice",
    "NextSentencePrediction",
    "ObjectDetection",
    "QuestionAnswering",
    "Segmentation",
)
"""Endings of `transformers` classes whose head belongs to one task; a language model's does not."""


def configuration(slots: Sequence[Slot], architecture: ModelArchitecture, config: Any) -> list[str]:
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
    which = f"lacks {some(lacking)}" if lacking else f"also has {some(sorted(extra))}"
    return [
        "the output's configuration (base_model's) does not fit: by it, the merged model "
        f"{which}. Name as `base_model:` a model with as many layers as the merge."
    ]


def left_out(
    files: ModelFiles,
    names: Iterable[str],
    weights: Iterable[WeightInfo],
    output_config: Any,
) -> list[str]:
    """Check that mergekit knows every parameter of a model that is built like the output.

    What it does not know it leaves out in silence, and transformers then draws it at random. Of a
    model of another architecture (`--allow-crimes`) it is told what the output has no place for.

    Args:
        files: the model's.
        names: the model's measured parameters, by their names in its files.
        weights: mergekit's description of the model.
        output_config: the output's `transformers` configuration.
    """
    known: set[str] = set()
    for weight in weights:
        known |= {weight.name, *(weight.aliases or ()), *(weight.tied_names or ())}
        stored = files.find(weight)
        known |= {part.name for part in stored.parts} if stored is not None else set()
    unknown = [name for name in names if name not in known]
    if unknown and files.config.architectures != output_config.architectures:
        LOG.warning(
            "%s is a %s: what the output, a %s, has no place for is left out: %s.",
            files.model,
            files.config.architectures[0],
            output_config.architectures[0],
            some(unknown),
        )
        return []
    return [_lacking(unknown, str(files.model))] if unknown else []


def code_left_behind(config: Any) -> list[str]:
    """Return the files of a model's own code without which the merge cannot be loaded.

    mergekit lets transformers save the configuration, and with it the file of its class; nothing
    copies the model's.

    Args:
        config: the output's `transformers` configuration.
    """
    named = getattr(config, "auto_map", None)
    if not isinstance(named, dict):
        return []
    own = {
        auto: value.partition(".")[0]
        for auto, value in named.items()
        if isinstance(value, str) and "--" not in value  # which is fetched from the Hub
    }
    return sorted({f"{name}.py" for name in own.values() if name != own.get("AutoConfig")})


def loads(slots: Sequence[Slot], config: Any, tokens: Vocabulary) -> list[str]:
    """Check that transformers would load the output: every parameter, and nothing converted twice.

    Args:
        slots: all output tensors, complete.
        config: the output's `transformers` configuration, with the size of its vocabulary.
        tokens: what becomes of the tables of tokens.
    """
    made_of = [(slot, slot.sources[0].tensor) for slot in slots if slot.sources]
    shapes = {
        slot.name: tokens.shape(slot) if slot.aligned else tensor.shape for slot, tensor in made_of
    }
    names = config.architectures or [""]
    try:
        model = skeleton(config, names[0])
        if model is None:
            return []
        written = {
            slot.name: TensorInfo(slot.name, Path(), tensor.dtype, shapes[slot.name], 0, 0)
            for slot, tensor in made_of
        }
        layout = Layout(model, written)
    except CheckpointError as error:
        return [f"transformers could not load the merged model: {error.message}"]
    made = {name for group in layout.groups for name in group.targets}
    by_name = dict(model.named_parameters(remove_duplicate=False))
    found = {id(parameter) for name, parameter in by_name.items() if name in made}
    lost = [name for name, p in model.named_parameters() if id(p) not in found]
    if lost:
        return [_lacking(lost, names[0])]
    if tokens.tokenizer is not None:
        held = {**by_name, **dict(model.named_buffers(remove_duplicate=False))}
        for name, shape in ((n, s) for g in layout.groups for n, s in g.targets.items()):
            if name in held and tuple(held[name].shape) != shape:
                return [
                    f"with the output's vocabulary {name} would have to be "
                    f"{list(held[name].shape)}, but merged it is {list(shape)}: mergekit does not "
                    "know where this kind of model has its tokens, or where its configuration says "
                    "how many they are. Merge models of one vocabulary, without "
                    "`tokenizer_source` and `tokenizer`."
                ]
    again = {s.name for g in layout.groups if not g.is_plain for s in g.sources}
    twice = [s.name for s in slots if s.name in again and any(x.is_made for x in s.sources)]
    if twice:
        return [
            f"mergekit asks for {some(twice)} as transformers has it in memory, and writes it "
            "under a name that transformers would convert once more while loading. Save all models "
            "again with one version of transformers."
        ]
    return []


def _lacking(names: Sequence[str], of: str) -> str:
    return (
        f"mergekit does not know {some(names)} of {of}, so the merged model would lack them; it "
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


def unlike_base(
    slots: Iterable[Slot], base: ModelReference, files: Files, tokens: Vocabulary
) -> list[str]:
    """Find tensors that do not fit the output's configuration, which is base_model's."""
    for slot in slots:
        info = files[base].find(slot.weight)
        if info is None:
            continue
        merged, own = slot.sources[0].tensor.shape, info.shape
        if slot.aligned and tokens.is_cut:
            merged = tokens.shape(slot)
        elif slot.sizes(own) == slot.sizes(merged):
            continue  # mergekit writes the size of the output's vocabulary into its configuration
        if merged != own:
            return [
                f"the output gets its configuration from base_model {base}, where {slot.name} is "
                f"{list(own)}; merged it is {list(merged)}. Name as `base_model:` a model of the "
                "same sizes."
            ]
    return []


def cut_for_nobody(slots: Iterable[Slot]) -> list[str]:
    """Find tables that are cut, while no base_model says whose configuration the output has."""
    for slot in slots:
        if len({source.tensor.shape for source in slot.aligned}) > 1:
            return [
                f"--unsafe-truncate-embeddings cuts {slot.name}: {slot.shapes}. The output needs "
                "a configuration and a tokenizer of that size: name as `base_model:` the model "
                "with the smallest vocabulary."
            ]
    return []
