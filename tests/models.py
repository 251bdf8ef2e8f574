"""Tiny real checkpoints of `transformers` architectures, and sidecars with chosen Fishers."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from fisher_mergekit.sidecar.checkpoint import Checkpoint
from fisher_mergekit.sidecar.header import Measurement, ModelIdentity, Settings, WeightRecord
from fisher_mergekit.sidecar.writer import describe, write_sidecar

Tensors = dict[str, torch.Tensor]

VOCABULARY = 24

_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
}
_DECODER = {**_ENCODER, "num_key_value_heads": 1, "head_dim": 4}
_VISION = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "image_size": 8,
    "patch_size": 4,
}
FAMILIES = {
    "bert": ("BertForSequenceClassification", _ENCODER),
    "roberta": ("RobertaForSequenceClassification", _ENCODER),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {
            "vocab_size": VOCABULARY,
            "dim": 8,
            "hidden_dim": 12,
            "n_layers": 2,
            "n_heads": 2,
            "max_position_embeddings": 16,
        },
    ),
    "llama": (
        "LlamaForCausalLM",
        {**_ENCODER, "num_key_value_heads": 1, "tie_word_embeddings": False},
    ),
    "qwen2": (
        "Qwen2ForCausalLM",
        {**_ENCODER, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "mixtral": (
        "MixtralForCausalLM",
        {**_ENCODER, "num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 8,
            "d_kv": 4,
            "d_ff": 12,
            "num_layers": 2,
            "num_heads": 2,
        },
    ),
    "vit": ("ViTForImageClassification", _VISION),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {
            **_DECODER,
            "num_experts": 3,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 6,
            "tie_word_embeddings": False,
        },
    ),
    "olmoe": ("OlmoeForCausalLM", {**_DECODER, "num_experts": 3, "num_experts_per_tok": 1}),
    "granite_moe": (
        "GraniteMoeForCausalLM",
        {**_DECODER, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **_DECODER},
            "vision_config": {"model_type": "clip_vision_model", **_VISION},
            "image_token_index": 20,
        },
    ),
    "qwen2_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": {
                **_DECODER,
                "rope_parameters": {
                    "rope_type": "default",
                    "mrope_section": [1, 1, 0],
                    "rope_theta": 1e4,
                },
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": 8,
                "num_heads": 2,
                "intermediate_size": 12,
                "out_hidden_size": 8,
                "patch_size": 4,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "window_size": 16,
                "fullatt_block_indexes": [0],
            },
            "image_token_id": 20,
            "video_token_id": 21,
            "vision_start_token_id": 22,
            "vision_end_token_id": 23,
        },
    ),
    "neox": ("GPTNeoXForCausalLM", _ENCODER),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16},
    ),
}
"""Architecture and sizes of each family."""


def make_model(
    folder: Path,
    family: str = "bert",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shard_size: str | None = None,
    **config: object,
) -> Path:
    """Save a tiny model with random values in every parameter, norms and biases too."""
    architecture, sizes = FAMILIES[family]
    model_class = getattr(transformers, architecture)
    model = model_class(model_class.config_class(**{**sizes, **config}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    options = {"max_shard_size": shard_size} if shard_size else {}
    model.to(dtype).save_pretrained(folder, **options)
    return folder


def read(folder: Path) -> Tensors:
    """Load every tensor of a model, whole or sharded."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def rewrite(folder: Path, tensors: Tensors) -> None:
    """Replace the tensors of an unsharded model."""
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")


def random_fishers(folder: Path, seed: int, scale: float = 1.0) -> Tensors:
    """Make up a Fisher for every floating tensor of a model: squares of very different size."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return {
        name: scale * torch.randn(tensor.shape, generator=generator).mul(1.5).exp().square()
        for name, tensor in sorted(read(folder).items())
        if tensor.is_floating_point()
    }


def write_fishers(
    folder: Path,
    fishers: Tensors,
    *,
    out: Path | None = None,
    unmeasured: dict[str, str] | None = None,
    shard_size: int = 1 << 30,
    **settings: object,
) -> Path:
    """Write a sidecar of a model, as if these Fishers had been measured."""
    checkpoint = Checkpoint(folder)
    base = {
        "estimator": "exact",
        "unit": "sequence",
        "likelihood": "categorical",
        "examples": 8,
        "tokens": 64,
        "max_length": 16,
        "seed": 0,
    }
    measurement = Measurement(
        settings=Settings.model_validate({**base, **settings}),
        calibration={"path": "made-up"},
        weights={name: WeightRecord.of(i) for name, i in checkpoint.items()},
        tensors=describe(fishers),
        unmeasured=unmeasured or {},
    )
    identity = ModelIdentity(reference=str(folder), architecture="made-up")
    place = out or folder / "sidecar"
    write_sidecar(place, "fisher", identity, measurement, fishers, shard_size=shard_size)
    return place


def make_measured(
    folder: Path, family: str = "bert", *, seed: int = 0, scale: float = 1.0, **options: object
) -> tuple[Path, Tensors, Tensors]:
    """Make a model and its sidecar; return the folder, the weights and the Fishers."""
    make_model(folder, family, seed=seed, **options)  # type: ignore[arg-type]
    fishers = random_fishers(folder, seed, scale)
    write_fishers(folder, fishers)
    return folder, read(folder), fishers
