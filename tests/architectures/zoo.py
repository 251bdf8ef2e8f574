"""A tiny random model of every architecture in mergekit's own list, and of some that it infers.

The list is the folder of mergekit's that holds it, so a file that mergekit adds is missed by
nothing: without a row here it fails. Sizes are as small as the architecture allows, and every
parameter is random, norms and biases too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mergekit
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

FOLDER = Path(mergekit.__file__).parent / "_data" / "architectures"

WORDS = 25
"""Vocabulary of the tokenizer in `inputs`."""
PAD, BOS, EOS = 0, 2, 3
VOCABULARY = 32
"""Of vision-language models: the words, then the special tokens below."""
IMAGE, VIDEO, VISION_START, VISION_END = 28, 29, 30, 31

_WIDTHS = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_DECODER = _WIDTHS | {"num_key_value_heads": 1, "tie_word_embeddings": False}
_HEADED = _DECODER | {"head_dim": 8}
_GPT2 = {
    "vocab_size": WORDS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32,
    "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS,
}  # fmt: skip
_BERT = _WIDTHS | {"num_labels": 3}
_DISTILBERT = {
    "vocab_size": WORDS, "dim": 16, "hidden_dim": 12, "n_layers": 2, "n_heads": 2,
    "max_position_embeddings": 32, "pad_token_id": PAD, "num_labels": 3,
}  # fmt: skip
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
_VIT = {
    "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip
_ROPE_3D = {
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    }
}  # fmt: skip
_QWEN_TEXT = _HEADED | {"vocab_size": VOCABULARY} | _ROPE_3D
_QWEN_VISION = {
    "depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 12, "patch_size": 4,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 16,
}  # fmt: skip
_QWEN_TOKENS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END, "pad_token_id": PAD, "tie_word_embeddings": False,
}  # fmt: skip

SIZES: dict[str, dict[str, Any]] = {
    "ApertusForCausalLM": _DECODER,
    "ArceeForCausalLM": _HEADED,
    "BertForMaskedLM": _BERT,
    "BertForMultipleChoice": _BERT,
    "BertForSequenceClassification": _BERT,
    "BertForTokenClassification": _BERT,
    "BertModel": _BERT,
    "CohereForCausalLM": _DECODER | {"tie_word_embeddings": True, "use_qk_norm": True},
    "Cohere2ForCausalLM": _HEADED | {"tie_word_embeddings": True, "sliding_window": 4},
    "DistilBertForMaskedLM": _DISTILBERT,
    "DistilBertForSequenceClassification": _DISTILBERT,
    "DistilBertForTokenClassification": _DISTILBERT,
    "DistilBertModel": _DISTILBERT,
    "FalconForCausalLM": _WIDTHS
    | {"new_decoder_architecture": True, "num_kv_heads": 1, "tie_word_embeddings": False},
    "GPT2ForSequenceClassification": _GPT2 | {"num_labels": 3},
    "GPT2LMHeadModel": _GPT2,
    "GPTBigCodeForCausalLM": _GPT2,
    "GPTNeoXForCausalLM": _WIDTHS | {"tie_word_embeddings": False},
    "GemmaForCausalLM": _HEADED | {"tie_word_embeddings": True},
    "Gemma2ForCausalLM": _HEADED
    | {"tie_word_embeddings": True, "query_pre_attn_scalar": 8, "sliding_window": 4},
    "Gemma3ForCausalLM": _HEADED
    | {"tie_word_embeddings": True, "query_pre_attn_scalar": 8, "sliding_window": 4},
    "Gemma3ForConditionalGeneration": {
        "text_config": _HEADED
        | {"vocab_size": VOCABULARY, "query_pre_attn_scalar": 8, "sliding_window": 4},
        "vision_config": _VIT | {"vision_use_head": False},
        "mm_tokens_per_image": 4,
        "boi_token_index": VISION_START,
        "eoi_token_index": VISION_END,
        "image_token_index": IMAGE,
    },
    "Glm4ForCausalLM": _HEADED,
    "AfmoeForCausalLM": _HEADED
    | {"num_experts": 3, "num_experts_per_tok": 2, "num_shared_experts": 1}
    | {"moe_intermediate_size": 8, "num_dense_layers": 1, "sliding_window": 4},
    "Glm4MoeForCausalLM": _HEADED
    | _MOE
    | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
    | {"use_qk_norm": True},
    "GraniteForCausalLM": _DECODER,
    "GraniteMoeHybridForCausalLM": _DECODER
    | {"num_local_experts": 3, "num_experts_per_tok": 2, "shared_intermediate_size": 10}
    | {"layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_state": 4}
    | {"mamba_d_head": 8, "mamba_chunk_size": 4, "mamba_d_conv": 3},
    "Lfm2ForCausalLM": _DECODER
    | {"layer_types": ["conv", "full_attention"], "tie_word_embeddings": True}
    | {"conv_L_cache": 3, "block_auto_adjust_ff_dim": False},
    "Llama4ForConditionalGeneration": {
        "text_config": _HEADED
        | {"vocab_size": VOCABULARY, "intermediate_size_mlp": 10, "num_local_experts": 2}
        | {"interleave_moe_layer_step": 2, "attention_chunk_size": 16},
        "vision_config": _VIT
        | {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
        | {"intermediate_size": 64},
        "boi_token_index": VISION_START,
        "eoi_token_index": VISION_END,
        "image_token_index": IMAGE,
        "tie_word_embeddings": False,
    },
    "LlamaForCausalLM": _HEADED,
    "LlamaForSequenceClassification": _HEADED | {"num_labels": 3},
    "MambaForCausalLM": {
        "vocab_size": WORDS, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2,
        "conv_kernel": 3, "time_step_rank": 2, "pad_token_id": PAD, "bos_token_id": BOS,
        "eos_token_id": EOS,
    },
    "MistralForCausalLM": _HEADED | {"sliding_window": 4},
    "Mistral3ForConditionalGeneration": {
        "text_config": _HEADED | {"model_type": "mistral", "vocab_size": VOCABULARY},
        "vision_config": _VIT | {"model_type": "pixtral", "head_dim": 8, "image_size": 8}
        | {"patch_size": 2},
        "image_token_index": IMAGE,
        "spatial_merge_size": 2,
        "tie_word_embeddings": False,
    },
    "MixtralForCausalLM": _HEADED | {"num_local_experts": 3, "num_experts_per_tok": 2},
    "Olmo2ForCausalLM": _DECODER,
    "PhiForCausalLM": _WIDTHS | {"tie_word_embeddings": False},
    "Phi3ForCausalLM": _DECODER,
    "Qwen2ForCausalLM": _DECODER,
    "Qwen2VLForConditionalGeneration": _QWEN_TOKENS
    | {
        "text_config": _QWEN_TEXT,
        "vision_config": _QWEN_VISION | {"embed_dim": 16, "mlp_ratio": 2},
    },
    "Qwen2_5_VLForConditionalGeneration": _QWEN_TOKENS
    | {
        "text_config": _QWEN_TEXT,
        "vision_config": _QWEN_VISION | {"window_size": 8, "fullatt_block_indexes": [1]},
    },
    "Qwen3ForCausalLM": _HEADED,
    "Qwen3MoeForCausalLM": _HEADED | _MOE | {"num_experts": 3},
    "Qwen3VLForConditionalGeneration": _QWEN_TOKENS
    | {
        "text_config": _QWEN_TEXT | {"num_hidden_layers": 4},
        "vision_config": _QWEN_VISION
        | {"num_position_embeddings": 16, "depth": 3, "deepstack_visual_indexes": [0, 1, 2]},
    },
    "Qwen3VLMoeForConditionalGeneration": _QWEN_TOKENS
    | {
        "text_config": _QWEN_TEXT | _MOE | {"num_experts": 3, "num_hidden_layers": 4},
        "vision_config": _QWEN_VISION
        | {"num_position_embeddings": 16, "depth": 3, "deepstack_visual_indexes": [0, 1, 2]},
    },
    "RobertaForMaskedLM": _BERT,
    "RobertaForSequenceClassification": _BERT,
    "RobertaForTokenClassification": _BERT,
    "RobertaModel": _BERT,
    "StableLmForCausalLM": _DECODER | {"use_qkv_bias": True},
    "Starcoder2ForCausalLM": _DECODER,
    "T5ForConditionalGeneration": {
        "vocab_size": WORDS, "d_model": 16, "d_kv": 8, "d_ff": 12, "num_layers": 2, "num_heads": 2,
        "pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": PAD,
        "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12,
        "initializer_factor": 0.1, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    },
    "WhisperForConditionalGeneration": {
        "vocab_size": WORDS, "num_mel_bins": 4, "d_model": 16, "encoder_layers": 2,
        "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
        "encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "max_source_positions": 6,
        "max_target_positions": 16, "pad_token_id": PAD, "bos_token_id": BOS,
        "eos_token_id": EOS, "decoder_start_token_id": BOS,
    },
    # What mergekit infers from the model's own class.
    "ModernBertForSequenceClassification": _BERT
    | {"local_attention": 4, "cls_token_id": BOS, "sep_token_id": EOS},
    "ModernBertForMaskedLM": _BERT
    | {"local_attention": 4, "cls_token_id": BOS, "sep_token_id": EOS},
    "DebertaV2ForSequenceClassification": _BERT
    | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
    | {"share_att_key": True, "norm_rel_ebd": "layer_norm", "position_buckets": 4},
    "MPNetForSequenceClassification": _BERT,
    "ViTForImageClassification": _VIT | {"num_labels": 3},
    "ElectraForSequenceClassification": _BERT | {"embedding_size": 6},
    "AlbertForSequenceClassification": _BERT | {"embedding_size": 6},
    "XLMRobertaForSequenceClassification": _BERT,
}  # fmt: skip
"""What a configuration needs, by transformers class."""

INFERRED = (
    "ModernBertForSequenceClassification",
    "ModernBertForMaskedLM",
    "DebertaV2ForSequenceClassification",
    "MPNetForSequenceClassification",
    "ViTForImageClassification",
    "ElectraForSequenceClassification",
    "AlbertForSequenceClassification",
    "XLMRobertaForSequenceClassification",
)
"""Architectures without a file in mergekit's list; it takes their tensors' names from the class."""

_REMOTE = (
    ("baichuan.json", "BaichuanForCausalLM"),
    ("chatglm.json", "ChatGLMModel"),
    ("exaone.json", "ExaoneForCausalLM"),
    ("internlm2.json", "InternLM2ForCausalLM"),
    ("jais.json", "JAISLMHeadModel"),
    ("phi-1.json", "MixFormerSequentialForCausalLM"),
    ("phi3-small.json", "Phi3SmallForCausalLM"),
    ("qwen.json", "QWenLMHeadModel"),
    ("solar.json", "SolarForCausalLM"),
    ("stablelm.json", "StableLMEpochForCausalLM"),
)
ABSENT: dict[tuple[str, str], str] = {
    **dict.fromkeys(_REMOTE, "not in transformers: its code comes with the model"),
    ("llama.json", "LLaMaForCausalLM"): "not in transformers: an old spelling of the one above",
    ("phi2-old.json", "PhiForCausalLM"): "model_type phi-msft is not in transformers: see phi2",
}
"""Entries of the list of which transformers has no class, and why."""

COMPLETED = {"_AfmoePartialForCausalLM": "AfmoeForCausalLM"}
"""Files that hold a part of an architecture, to which mergekit adds the experts."""

SEEDS = {"Gemma3ForConditionalGeneration": 2}
"""Other first seeds, where float32 itself (plain autograd, one example at a time) is off by more
than half of what is allowed."""


BODIES = ("BertModel", "DistilBertModel", "RobertaModel")
"""Models that predict nothing, so that there is nothing to measure."""

UNMERGED: dict[str, tuple[str, str]] = {
    "BertForMaskedLM": (
        "mergekit's file demands a pooler that this class has not, and knows nothing of its "
        "`cls.predictions.transform`",
        "mergekit expects bert.pooler.dense.weight",
    ),
    "Qwen2VLForConditionalGeneration": (
        "mergekit's file looks for `num_hidden_layers` where transformers 5 has no such field",
        "mergekit cannot plan this merge",
    ),
    "WhisperForConditionalGeneration": (
        "mergekit's file misspells the tensors' names (`model.decoderlayers.0…`)",
        "mergekit expects model.decoderembed_tokens.weight",
    ),
}
"""What mergekit cannot merge by any method: why, and the beginning of the message."""

BROKEN = {
    "Llama4ForConditionalGeneration": "5.24.0 reads `image_outputs` of an output without any",
}
"""What a version of transformers cannot run by itself, where the tests have met one."""

REMARKS = {
    "FalconForCausalLM": "as Falcon-40B: mergekit's file knows no biases and no tied head",
    "Gemma3ForConditionalGeneration": "pictures and text",
    "GPTNeoXForCausalLM": "files with the buffers that transformers 4 wrote: mergekit demands them",
    "Llama4ForConditionalGeneration": (
        "pictures and text, packed experts; transformers 5.24.0 itself cannot run it"
    ),
    "Mistral3ForConditionalGeneration": "pictures and text",
    "PhiForCausalLM": "without `qk_layernorm`, which mergekit's file does not know",
    "Qwen2VLForConditionalGeneration": "pictures and text",
    "Qwen2_5_VLForConditionalGeneration": "pictures and text",
    "Qwen3VLForConditionalGeneration": "pictures and text",
    "Qwen3VLMoeForConditionalGeneration": "pictures and text, packed experts",
    "StableLmForCausalLM": "without `qk_layernorm`, which mergekit's file does not know",
    "T5ForConditionalGeneration": "as T5 1.1 and FLAN-T5, which mergekit's file is of",
    "ViTForImageClassification": "pictures",
    "WhisperForConditionalGeneration": "sounds",
    **dict.fromkeys(
        ("AfmoeForCausalLM", "Glm4MoeForCausalLM", "GraniteMoeHybridForCausalLM"),
        "packed experts",
    ),
    **dict.fromkeys(("MixtralForCausalLM", "Qwen3MoeForCausalLM"), "packed experts"),
}
"""What else the table says of a model that is measured."""


@dataclass(frozen=True)
class Entry:
    """One architecture.

    Attributes:
        file: mergekit's file, or "" where it infers the architecture.
        architecture: name of the transformers class.
        model_type: of its configuration, by mergekit.
    """

    file: str
    architecture: str
    model_type: str = ""

    @property
    def absent(self) -> str | None:
        """Why there is no model of it, or None."""
        return ABSENT.get((self.file, self.architecture))

    def __str__(self) -> str:
        return f"{self.file.removesuffix('.json')}-{self.architecture}".lstrip("-")


def entries() -> Iterator[Entry]:
    """Yield all that mergekit lists, and then what it infers."""
    for path in sorted(FOLDER.glob("*.json")):
        definition = json.loads(path.read_text(encoding="utf-8"))
        for architecture in definition["architectures"]:
            architecture = COMPLETED.get(architecture, architecture)
            yield Entry(path.name, architecture, definition["model_type"])
    for architecture in INFERRED:
        yield Entry("", architecture)


def build(architecture: str, seed: int = 0) -> nn.Module:
    """Make a tiny model whose norms and biases are as random as the rest."""
    model_class = getattr(transformers, architecture)
    seed += SEEDS.get(architecture, 0)
    torch.manual_seed(seed)  # some layers draw their first values themselves
    model = model_class(model_class.config_class(**SIZES[architecture])).eval()
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model


def save(architecture: str, folder: Path, seed: int = 0) -> None:
    """Save a tiny model, with all that mergekit wants in its files."""
    build(architecture, seed).save_pretrained(folder)
    if architecture == "GPTNeoXForCausalLM":
        # mergekit's list is of files that transformers 4 wrote, with the buffers of each layer.
        file = folder / "model.safetensors"
        tensors = load_file(file)
        for layer in range(2):
            attention = f"gpt_neox.layers.{layer}.attention"
            tensors[f"{attention}.bias"] = torch.ones(1, 1, 32, 32, dtype=torch.bool).tril()
            tensors[f"{attention}.masked_bias"] = torch.tensor(-1e9)
            tensors[f"{attention}.rotary_emb.inv_freq"] = torch.ones(1)
        save_file(tensors, file, metadata={"format": "pt"})
