"""A PEFT adapter alone: its own parameters are measured, on the model that it was trained on.

The model is frozen and not measured. Names and shapes are those in the adapter's files, which are
not those in memory (`lora_A.weight` for `lora_A.default.weight`); peft itself is asked which
parameter is written under which name, and values are compared as for any model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from fisher_mergekit.errors import CheckpointError, MeasureError
from fisher_mergekit.sidecar.checkpoint import Checkpoint
from fisher_mergekit.sidecar.layout import Group, skeleton

ADAPTER_STEM = "adapter_model"
_CONFIG = "adapter_config.json"
_INSIDE = "base_model.model."
"""What the model's own names begin with in an adapter's files."""

_TASKS = {
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
}
"""peft's task types, and transformers' list of the classes for each."""


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no whole model."""
    whole = any(any(folder.glob(pattern)) for pattern in ("model*.safetensors*", "pytorch_model*"))
    return (folder / _CONFIG).is_file() and not whole


def base_of(folder: Path) -> tuple[str, str | None]:
    """Return the model that an adapter was trained on, and its revision if that matters.

    Raises:
        CheckpointError: the adapter does not say.
    """
    settings = _settings(folder)
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not base:
        raise CheckpointError(
            f"{folder / _CONFIG} does not say which model the adapter was trained on; write it "
            "there as base_model_name_or_path."
        )
    return base, revision


def read_adapter_config(
    folder: Path, base: Path, *, trust_remote_code: bool = False
) -> tuple[PretrainedConfig, str]:
    """Return the configuration of the model under an adapter, and its transformers class.

    The adapter's task decides on the class: a classifier is often trained on a model without a
    head, and brings its own head, whose size then is the number of labels.

    Raises:
        CheckpointError: no such model, or files that cannot be read.
        MeasureError: a kind of adapter that has no parameters to measure in the model.
    """
    checkpoint = Checkpoint(folder, ADAPTER_STEM)
    settings = _settings(folder)
    if settings.get("is_prompt_learning") or settings.get("num_virtual_tokens"):
        raise MeasureError(
            f"{folder} is an adapter of type {settings.get('peft_type')}, which puts made-up "
            "tokens before the text; such adapters cannot be measured. LoRA and others that "
            "change layers can."
        )
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    except Exception as error:  # a validator of its own for every field of every architecture
        raise CheckpointError(
            f"{base} is not a model that transformers can read: {error}"
        ) from None
    classes = getattr(transformers, _TASKS.get(str(settings.get("task_type")), ""), {})
    own = str((config.architectures or [""])[0])
    found = classes.get(type(config), None)
    architecture = own if found is None else str(found.__name__)
    if not architecture:
        raise CheckpointError(
            f"{base}/config.json names no architecture; save the model with save_pretrained."
        )
    model = skeleton(config, architecture)
    for name, parameter in model.named_parameters() if model is not None else ():
        info = checkpoint.get(_INSIDE + name)
        is_head = parameter.shape[:1] == (config.num_labels,)
        if info is not None and info.shape != parameter.shape and is_head:
            config.num_labels = info.shape[0]
            break
    return config, architecture


def check_adapter(checkpoint: Checkpoint) -> None:
    """Raise MeasureError for values in an adapter's files that are not finite."""
    for name, info in checkpoint.items():
        if info.is_floating and not checkpoint.load(name).isfinite().all():
            raise MeasureError(
                f"{name} in {info.file} holds NaN or infinity. Nothing that is computed with this "
                "adapter means anything; save it again from a sound copy."
            )


def load_adapter(
    folder: Path,
    base: Path,
    model_class: Any,
    config: PretrainedConfig,
    dtype: torch.dtype,
    **options: Any,
) -> tuple[nn.Module, tuple[Group, ...], dict[str, str]]:
    """Load a model with an adapter in it.

    Args:
        folder: the adapter.
        base: the model that it was trained on.
        model_class: that loads the model.
        config: the model's.
        dtype: to compute in; of the adapter too.
        options: of `from_pretrained`.

    Returns:
        The model, which of its parameters is which tensor in the adapter's files, and why the
        other floating tensors there are not measured.

    Raises:
        CheckpointError: it cannot be loaded.
        MeasureError: parameters of the model are in no file.
    """
    checkpoint = Checkpoint(folder, ADAPTER_STEM)
    try:
        model, info = model_class.from_pretrained(
            base, config=config, dtype=dtype, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise CheckpointError(f"transformers cannot load {base}: {error}") from error
    random = [name for name in sorted(info["missing_keys"]) if _INSIDE + name not in checkpoint]
    if random:
        raise MeasureError(
            f"neither {base} nor the adapter has {', '.join(random[:4])} of "
            f"{type(model).__name__}: transformers would fill in random numbers. Train the "
            "adapter with its head in modules_to_save."
        )
    try:
        adapted = PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False)
    except Exception as error:  # peft's own errors are of every class
        raise CheckpointError(f"peft cannot put {folder} on {base}: {error}") from None
    inside: nn.Module = adapted.get_base_model().to(dtype)
    parameters = dict(inside.named_parameters(remove_duplicate=False))
    by_place = {_place(parameter): name for name, parameter in parameters.items()}
    written = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    groups, unmeasured = [], {}
    for name, tensor in checkpoint.items():
        target = by_place.get(_place(written[name])) if name in written else None
        if target is not None:
            groups.append(Group((tensor,), {target: tuple(parameters[target].shape)}))
        elif tensor.is_floating:
            unmeasured[name] = "not a parameter of the adapter"
    absent = [name for name in written if name not in checkpoint]
    if absent:
        raise MeasureError(
            f"{folder} lacks {', '.join(absent[:4])} of its adapter; peft would fill in its own "
            "first values. Save the adapter again, whole."
        )
    return inside, tuple(groups), unmeasured


def _place(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tuple(tensor.shape)


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        return dict(settings)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / _CONFIG} is not readable: {error}") from None
