"""What transformers makes of files while loading, against transformers itself."""

import pytest
import torch
import transformers
from models import FAMILIES, make_model, read
from transformers import conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter

from fisher_mergekit.errors import CheckpointError
from fisher_mergekit.sidecar.checkpoint import Checkpoint
from fisher_mergekit.sidecar.layout import Layout, skeleton

FOLDED = ["mixtral", "qwen3_moe", "olmoe", "granite_moe", "vit", "llava", "qwen2_vl", "neox"]
"""Families whose files are not what is in memory: packed, chunked, or only called otherwise."""


def layout_of(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    return Layout(skeleton(config, config.architectures[0]), Checkpoint(folder))


def load(folder, family):
    return getattr(transformers, FAMILIES[family][0]).from_pretrained(folder)


@pytest.fixture(params=FOLDED)
def saved(request, tmp_path):
    """Return the folder and the family of a model; more than ten experts, to be ordered rightly."""
    many = {"mixtral": "num_local_experts", "qwen3_moe": "num_experts"}.get(request.param)
    config = {many: 12} if many else {}
    return make_model(tmp_path / "model", request.param, **config), request.param


def test_files_become_what_transformers_loads(saved):
    folder, family = saved
    layout, tensors = layout_of(folder), read(folder)
    names = {name for name, _ in load(folder, family).named_parameters()}
    assert set(tensors) - names, "this family tests nothing"
    assert not layout.unused
    made = {n: t for group in layout.groups for n, t in group.convert(tensors).items()}
    loaded = dict(load(folder, family).named_parameters())
    assert set(loaded) <= set(made)
    for name, parameter in loaded.items():
        assert torch.equal(made[name], parameter), name
        assert layout.maker(name)[1].targets[name] == tuple(parameter.shape)


def test_what_is_restored_is_what_the_files_hold(saved):
    """And squares of it are squares there: nothing but places is changed."""
    folder, family = saved
    tensors, loaded = read(folder), load(folder, family).state_dict()
    for power in (1, 2):
        restored = {}
        for group in layout_of(folder).groups:
            restored |= group.restore({name: loaded[name] ** power for name in group.targets})
        assert set(restored) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(restored[name], tensor**power), name


def test_places_are_a_permutation(saved):
    folder, _ = saved
    for group in layout_of(folder).groups:
        places = torch.cat([place.flatten() for place in group.places().values()])
        assert torch.equal(places.sort().values, torch.arange(len(places), dtype=places.dtype))


def test_names_of_any_age_lead_to_the_parameter(tmp_path):
    layout = layout_of(make_model(tmp_path / "bert", "bert"))
    for name in (
        "bert.embeddings.LayerNorm.weight",
        "bert.embeddings.LayerNorm.gamma",
        "embeddings.LayerNorm.weight",
    ):
        assert layout.maker(name)[0] == "bert.embeddings.LayerNorm.weight"
    assert layout.maker("bert.embeddings.LayerNorm.scale") is None


class Doubled(ConversionOps):
    """A conversion that computes."""

    def convert(self, input_dict, source_patterns, target_patterns, **_):
        (tensors,) = input_dict.values()
        return {target_patterns[0]: tensors[0] * 2}


class Repeated(ConversionOps):
    """A conversion that keeps only a part, twice."""

    def convert(self, input_dict, source_patterns, target_patterns, **_):
        (tensors,) = input_dict.values()
        half = tensors[0].chunk(2)[0]
        return {target_patterns[0]: torch.cat([half, half])}


@pytest.mark.parametrize("operation", [Doubled(), Repeated()])
def test_a_conversion_that_computes_is_refused(tmp_path, monkeypatch, operation):
    folder = make_model(tmp_path / "llama", "llama")
    converter = WeightConverter("mlp.up_proj.weight", "mlp.up_proj.weight", [operation])
    known = conversion_mapping.get_checkpoint_conversion_mapping
    monkeypatch.setattr(
        conversion_mapping,
        "get_checkpoint_conversion_mapping",
        lambda key: [converter] if key == "llama" else known(key),
    )
    converted = [group for group in layout_of(folder).groups if not group.is_plain]
    assert len(converted) == 2
    for group in converted:
        with pytest.raises(CheckpointError, match=r"transformers computes .*up_proj\.weight from"):
            group.places()


def test_experts_of_different_size_are_told(tmp_path):
    folder = make_model(tmp_path / "mixtral", "mixtral")
    infos = dict(Checkpoint(folder))
    odd = next(name for name in infos if name.endswith("experts.1.w1.weight"))
    infos[odd] = type(infos[odd])(odd, infos[odd].file, "F32", (3, 8), 0, 96)
    config = transformers.AutoConfig.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"cannot make .*gate_up_proj of .*w1\.weight"):
        Layout(skeleton(config, config.architectures[0]), infos)
