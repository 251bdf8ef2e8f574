"""Tiny LoRA adapters on disk, made by peft, with random values in every parameter."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model


def make_adapter(
    folder: Path,
    base: Path,
    *,
    model_class: str,
    seed: int = 0,
    labels: int | None = None,
    **options: object,
) -> Path:
    """Train nothing: put an adapter on a model, fill it with noise, and save it."""
    config = transformers.AutoConfig.from_pretrained(base)
    if labels is not None:
        config.num_labels = labels
    model = getattr(transformers, model_class).from_pretrained(base, config=config)
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=3, **options))
    generator = torch.Generator().manual_seed(100 + seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)
    return folder
