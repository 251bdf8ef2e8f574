"""Names of every family find their layer and their type."""

from __future__ import annotations

import pytest

from fisher_mergekit.study.mass import layer_of, type_of


@pytest.mark.parametrize(
    ("name", "layer", "type_"),
    [
        ("bert.encoder.layer.3.attention.self.query.weight", 3, "attention"),
        ("bert.encoder.layer.3.attention.output.LayerNorm.weight", 3, "norm"),
        ("bert.encoder.layer.11.output.dense.weight", 11, "feed-forward"),
        ("bert.embeddings.word_embeddings.weight", None, "embedding"),
        ("bert.embeddings.LayerNorm.bias", None, "norm"),
        ("classifier.weight", None, "other"),
        ("distilbert.transformer.layer.0.ffn.lin1.weight", 0, "feed-forward"),
        ("distilbert.transformer.layer.0.sa_layer_norm.weight", 0, "norm"),
        ("model.layers.17.self_attn.q_proj.weight", 17, "attention"),
        ("model.layers.17.mlp.down_proj.weight", 17, "feed-forward"),
        ("model.layers.17.block_sparse_moe.experts.3.w1.weight", 17, "feed-forward"),
        ("model.layers.17.input_layernorm.weight", 17, "norm"),
        ("model.embed_tokens.weight", None, "embedding"),
        ("h.2.ln_1.weight", 2, "norm"),
        ("transformer.h.2.attn.c_attn.weight", 2, "attention"),
        ("transformer.wte.weight", None, "embedding"),
        ("lm_head.weight", None, "other"),
    ],
)
def test_a_name_finds_its_layer_and_type(name: str, layer: int | None, type_: str) -> None:
    assert (layer_of(name), type_of(name)) == (layer, type_)
