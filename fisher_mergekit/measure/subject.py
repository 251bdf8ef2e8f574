"""The model that is measured, and which of its parameters is which tensor in its files.

In memory a tensor can have another name than on disk: a checkpoint without the head's prefix
(`h.0.attn…` for `transformer.h.0.attn…`), or old spellings (`LayerNorm.gamma`). A sidecar uses the
names on disk. They are matched by name and then *compared by value*: a measured parameter that is
not the very tensor it is filed under would put one tensor's Fisher on another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from fisher_mergekit.errors import CheckpointError, MeasureError
from fisher_mergekit.sidecar.checkpoint import Checkpoint
from fisher_mergekit.sidecar.header import WeightRecord

_OLD_SPELLINGS = ((".gamma", ".weight"), (".beta", ".bias"))


@dataclass(frozen=True)
class Subject:
    """A loaded model and its files.

    Attributes:
        model: on its device, in the dtype to compute in.
        architecture: name of its transformers class.
        checkpoint: its files.
        names: every floating tensor in the files that is a parameter, and that parameter.
        unmeasured: the other floating tensors in the files, and why they are not measured.
    """

    model: nn.Module
    architecture: str
    checkpoint: Checkpoint
    names: dict[str, nn.Parameter]
    unmeasured: dict[str, str]

    @property
    def config(self) -> PretrainedConfig:
        """The model's configuration."""
        config: PretrainedConfig = self.model.config
        return config

    @property
    def pad_token_id(self) -> int:
        """Any id to pad with; padding is masked."""
        return int(self.config.pad_token_id)

    def weight_records(self) -> dict[str, WeightRecord]:
        """Return the identity of every measured tensor, as it is in the files."""
        return {
            name: WeightRecord(dtype=info.dtype, shape=info.shape, digest=info.digest())
            for name, info in self.checkpoint.items()
            if name in self.names
        }


def read_config(folder: Path, *, trust_remote_code: bool = False) -> tuple[PretrainedConfig, str]:
    """Return a checkpoint's configuration, and the transformers class that it was saved from.

    Raises:
        CheckpointError: no readable config.json, or one that names no architecture.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a validator of its own for every field of every architecture
        raise CheckpointError(
            f"{folder} is not a model that transformers can read: {error}"
        ) from None
    if not config.architectures:
        raise CheckpointError(
            f"{folder}/config.json names no architecture; save the model with save_pretrained."
        )
    return config, str(config.architectures[0])


def read_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Return a checkpoint's tokenizer.

    Raises:
        CheckpointError: there is none that transformers can read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers' own errors are bare Exceptions
        raise CheckpointError(
            f"{folder} has no tokenizer that transformers can read: {error}"
        ) from None
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        # Without files transformers makes up one to which every word is unknown.
        raise CheckpointError(
            f"{folder} has no tokenizer, or one without words. Put the model's tokenizer files "
            "(tokenizer.json and tokenizer_config.json) into its folder."
        )
    return tokenizer


def check_tensors(config: PretrainedConfig, architecture: str, checkpoint: Checkpoint) -> None:
    """Find out, without loading the model, whether the files hold all of it and no NaN.

    Raises:
        CheckpointError: a configuration that describes no model.
        MeasureError: a parameter without a tensor of its shape, or a value that is not finite.
    """
    if not hasattr(transformers, architecture):
        return  # remote code is not run before it has to be
    try:
        with torch.device("meta"):
            skeleton = getattr(transformers, architecture)(config)
    except Exception as error:  # whatever its code stumbles over
        raise CheckpointError(
            f"{checkpoint.folder}/config.json describes no {architecture} that transformers can "
            f"build: {error}"
        ) from None
    for name, match in _match(skeleton, checkpoint)[0].items():
        values = checkpoint.load(name)
        if not values.isfinite().all():
            raise MeasureError(
                f"{name} in {checkpoint[name].file} holds NaN or infinity ({match}). Nothing that "
                "is computed with this model means anything; save it again from a sound copy."
            )


def load_subject(
    folder: Path,
    tokenizer: Any,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> Subject:
    """Load a model for measuring.

    Raises:
        CheckpointError: missing or damaged files, or pickles.
        MeasureError: tensors are missing from the files, or the model holds parameters that are
            not simply tensors of its files.
    """
    checkpoint = Checkpoint(folder)
    _, architecture = read_config(folder, trust_remote_code=trust_remote_code)
    model_class = _model_class(architecture)
    try:
        model = model_class.from_pretrained(
            folder, dtype=dtype, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"transformers cannot load {folder}: {error}") from error
    model.config.use_cache = False
    _settle_padding(model.config, tokenizer)
    names, unmeasured = _match(model, checkpoint)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, match in names.items():
        _compare(checkpoint, name, match, parameters[match])
    measured = {name: parameters[match] for name, match in names.items()}
    return Subject(model.to(device), architecture, checkpoint, measured, unmeasured)


def _model_class(architecture: str) -> Any:
    """Return the transformers class, or the Auto class for remote code."""
    if hasattr(transformers, architecture):
        return getattr(transformers, architecture)
    if architecture.endswith("ForSequenceClassification"):
        return transformers.AutoModelForSequenceClassification
    return transformers.AutoModelForCausalLM


def _settle_padding(config: PretrainedConfig, tokenizer: Any) -> None:
    """Agree on one padding id: classifiers of decoders look for the last token that is not it."""
    candidates = (
        config.pad_token_id,
        tokenizer.pad_token_id,
        config.eos_token_id,
        tokenizer.eos_token_id,
    )
    for candidate in candidates:
        if isinstance(candidate, list):
            candidate = candidate[0]
        if candidate is not None and 0 <= candidate < config.vocab_size:
            config.pad_token_id = int(candidate)
            return
    config.pad_token_id = 0


def _match(model: nn.Module, checkpoint: Checkpoint) -> tuple[dict[str, str], dict[str, str]]:
    """Match the floating tensors in the files with the parameters in memory, by name.

    Returns:
        The parameter's name by the tensor's, and why the other tensors are not measured.

    Raises:
        MeasureError: a parameter has no tensor, or one of another shape.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    prefix = getattr(model, "base_model_prefix", "")
    names: dict[str, str] = {}
    unmeasured: dict[str, str] = {}
    for name, info in checkpoint.items():
        if not info.is_floating:
            continue
        spellings = list(_spellings(name, prefix))
        match = next((s for s in spellings if s in parameters), None)
        if match is not None:
            names[name] = match
            needed = parameters[match].shape
            if info.shape != needed:
                raise MeasureError(
                    f"{name} in {info.file} has shape {list(info.shape)}, but by config.json "
                    f"{type(model).__name__} has {list(needed)} there. Weights and configuration "
                    "must belong together."
                )
        elif any(s in buffers for s in spellings):
            unmeasured[name] = "a buffer"
        else:
            unmeasured[name] = f"not used by {type(model).__name__}"
    found = {parameters[match] for match in names.values()}
    lost = [name for name, p in model.named_parameters() if p not in found]
    if lost:
        raise MeasureError(
            f"{checkpoint.folder} has no tensors for {len(lost)} parameters of "
            f"{type(model).__name__} ({', '.join(lost[:4])}). Only a whole model can be measured: "
            "transformers would fill in random numbers, or make them from other tensors while "
            "loading, which cannot be measured yet."
        )
    return names, unmeasured


def _compare(checkpoint: Checkpoint, name: str, match: str, parameter: nn.Parameter) -> None:
    """Raise MeasureError if the parameter is not the very tensor in the file."""
    stored = checkpoint.load(name)
    if not torch.equal(stored.to(parameter.dtype), parameter.detach()):
        raise MeasureError(
            f"{name} in {checkpoint[name].file} is not what the model holds as {match}: "
            "transformers converts this checkpoint while loading, which cannot be measured yet."
        )


def _spellings(name: str, prefix: str) -> Iterator[str]:
    """Yield the names that a tensor in the files can have in memory."""
    for old, new in (("", ""), *_OLD_SPELLINGS):
        if not name.endswith(old):
            continue
        plain = name[: len(name) - len(old)] + new
        yield plain
        yield f"{prefix}.{plain}"
        yield plain.removeprefix(f"{prefix}.")
