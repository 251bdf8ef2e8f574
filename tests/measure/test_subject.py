"""Which parameter is which tensor in the files: names, aliases, prefixes, old spellings."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from models import make_model, read, rewrite

from fisher_mergekit.errors import CheckpointError, MeasureError
from fisher_mergekit.measure.subject import (
    _settle_padding,
    check_tensors,
    load_subject,
    read_config,
)
from fisher_mergekit.sidecar.checkpoint import Checkpoint

FAMILIES = ("bert", "roberta", "distilbert", "llama", "qwen2", "gpt2")


def load(folder, **options):
    config, architecture = read_config(folder)
    check_tensors(config, architecture, Checkpoint(folder))
    return load_subject(folder, **options)


@pytest.fixture
def model(tmp_path):
    return lambda family, **options: tiny.save_model(tmp_path / family, family, **options)


def on_disk(subject):
    """Return the model's own parameters as they would be filed."""
    return dict(subject.on_disk({p: p.detach() for p in subject.model.parameters()}))


def assert_whole(subject, tensors):
    """Every floating tensor in the files is measured under its name, in its place."""
    found = on_disk(subject)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name
    assert {n: (r.shape, r.dtype) for n, r in subject.weight_records().items()} == {
        n: (i.shape, i.dtype) for n, i in subject.checkpoint.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_those_of_the_files(model, family):
    folder = model(family)
    assert_whole(load(folder), read(folder))


def test_shards_are_one_model(tmp_path):
    folder = make_model(tmp_path / "sharded", "bert", shard_size="3KB")
    tiny.save_tokenizer(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert_whole(load(folder), read(folder))


def test_a_gpt2_checkpoint_without_its_prefix(model):
    """As the published gpt2 is: `h.0.…` for `transformer.h.0.…`, and masks among the weights."""
    folder = model("gpt2")
    plain = {name.removeprefix("transformer."): value for name, value in read(folder).items()}
    rewrite(folder, {**plain, "h.0.attn.bias": torch.ones(1, 1, 16, 16)})
    subject = load(folder)
    found = on_disk(subject)
    assert set(found) == set(plain)
    assert all(torch.equal(found[name], value) for name, value in plain.items())
    assert set(subject.unmeasured) == {"h.0.attn.bias"}


def test_a_bert_checkpoint_with_gamma_and_beta(model):
    folder = model("bert")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for name, value in read(folder).items()
    }
    assert any(name.endswith(".gamma") for name in old)
    rewrite(folder, old)
    assert_whole(load(folder), old)


def test_a_tied_model_whose_files_hold_both_names(model):
    folder = model("qwen2")
    both = {**read(folder), "lm_head.weight": read(folder)["model.embed_tokens.weight"].clone()}
    rewrite(folder, both)
    subject = load(folder)
    assert len(list(subject.model.parameters())) == len(subject.groups) - 1
    assert_whole(subject, both)


def test_what_the_model_does_not_use_is_recorded_as_unmeasured(model):
    folder = model("bert")
    tensors = read(folder)
    extra = {"cls.predictions.bias": torch.ones(3), "bert.embeddings.position_ids": torch.arange(4)}
    rewrite(folder, {**tensors, **extra})
    subject = load(folder)
    assert set(on_disk(subject)) == set(tensors)
    assert subject.unmeasured == {
        "cls.predictions.bias": "not used by BertForSequenceClassification"
    }


def test_bfloat16_files_are_measured_in_float32(model):
    folder = model("bert", dtype=torch.bfloat16)
    subject = load(folder)
    assert {p.dtype for p in subject.model.parameters()} == {torch.float32}
    assert {r.dtype for r in subject.weight_records().values()} == {"BF16"}


def test_a_tensor_of_another_shape_is_refused(model):
    folder = model("bert")
    rewrite(folder, {**read(folder), "classifier.bias": torch.zeros(5)})
    with pytest.raises(MeasureError, match=r"classifier\.bias in .* has shape \[5\].* has \[2\]"):
        load(folder)


def test_a_checkpoint_that_is_converted_while_loading_is_refused(model, monkeypatch):
    """A parameter that is not the very tensor would put one tensor's Fisher on another."""
    folder = model("bert")
    bert = tiny.transformers.BertForSequenceClassification
    load_model = bert.from_pretrained

    def converted(*arguments, **options):
        loaded = load_model(*arguments, **options)
        loaded.classifier.weight.data = loaded.classifier.weight.data.flip(0)
        return loaded

    monkeypatch.setattr(bert, "from_pretrained", converted)
    with pytest.raises(MeasureError, match=r"classifier\.weight in .* is not what the model holds"):
        load(folder)


@pytest.mark.parametrize(
    ("named", "used", "expected"),
    [
        (5, {5, 6}, 5),
        (None, {0, 1, 3}, 2),
        (None, set(), 0),
        (-1, {0}, 1),
        (24, {0}, 1),  # a pad token that was added without a row in the embedding
        (None, range(24), None),
    ],
)
def test_padding_is_what_the_model_says_or_an_id_that_no_text_has(named, used, expected):
    config = tiny.transformers.LlamaConfig(vocab_size=24, pad_token_id=named)
    _settle_padding(config, used)
    assert config.pad_token_id == expected


def test_the_architecture_is_read_from_the_configuration(model):
    folder = model("llama")
    assert read_config(folder)[1] == "LlamaForCausalLM"
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="names no architecture; save the model with"):
        read_config(folder)
