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
        tokenizer: its tokenizer.
        architecture: name of its transformers class.
        checkpoint: its files.
        names: every floating tensor in the files that is a parameter, and that parameter.
        unmeasured: the other floating tensors in the files, and why they are not measured.
    """

    model: nn.Module
    tokenizer: Any
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


def architecture_of(folder: Path, *, trust_remote_code: bool = False) -> str:
    """Return the transformers class that a checkpoint was saved from.

    Raises:
        CheckpointError: no readable config.json, or one that names no architecture.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} is not a model that transformers can read: {error}"
        ) from None
    if not config.architectures:
        raise CheckpointError(
            f"{folder}/config.json names no architecture; save the model with save_pretrained."
        )
    return str(config.architectures[0])


def load_subject(
    folder: Path,
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
    architecture = architecture_of(folder, trust_remote_code=trust_remote_code)
    model_class = _model_class(architecture)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        model, info = model_class.from_pretrained(
            folder, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"transformers cannot load {folder}: {error}") from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:4])
        raise MeasureError(
            f"{folder} lacks {len(info['missing_keys'])} tensors of {architecture} ({missing}); "
            "transformers would fill them with random numbers. Only a whole model can be measured."
        )
    model.config.use_cache = False
    _settle_padding(model.config, tokenizer)
    names, unmeasured = _match(model, checkpoint, dtype)
    return Subject(model.to(device), tokenizer, architecture, checkpoint, names, unmeasured)


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
        if candidate is not None and candidate >= 0:
            config.pad_token_id = int(candidate)
            return
    config.pad_token_id = 0


def _match(
    model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype
) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
    """Match the tensors in the files with the parameters in memory, by name and by value."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    prefix = getattr(model, "base_model_prefix", "")
    names: dict[str, nn.Parameter] = {}
    unmeasured: dict[str, str] = {}
    for name, info in checkpoint.items():
        if not info.is_floating:
            continue
        spellings = list(_spellings(name, prefix))
        match = next((s for s in spellings if s in parameters), None)
        if match is None:
            is_buffer = any(s in buffers for s in spellings)
            unmeasured[name] = "a buffer" if is_buffer else f"not used by {type(model).__name__}"
            continue
        parameter = parameters[match]
        stored = checkpoint.load(name)
        if stored.shape != parameter.shape or not torch.equal(
            stored.to(dtype).nan_to_num(), parameter.detach().nan_to_num()
        ):
            raise MeasureError(
                f"{name} in {info.file} is not what {type(model).__name__} holds as {match}: "
                "transformers converts this checkpoint while loading, which cannot be measured yet."
            )
        names[name] = parameter
    found = set(names.values())
    lost = [name for name, p in model.named_parameters() if p not in found]
    if lost:
        raise MeasureError(
            f"{len(lost)} parameters of {type(model).__name__}, for example {lost[0]}, have no "
            f"tensor of their own in {checkpoint.folder}: transformers converts this checkpoint "
            "while loading, which cannot be measured yet."
        )
    return names, unmeasured


def _spellings(name: str, prefix: str) -> Iterator[str]:
    """Yield the names that a tensor in the files can have in memory."""
    for old, new in (("", ""), *_OLD_SPELLINGS):
        if not name.endswith(old):
            continue
        plain = name[: len(name) - len(old)] + new
        yield plain
        yield f"{prefix}.{plain}"
        yield plain.removeprefix(f"{prefix}.")
