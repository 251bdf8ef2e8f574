"""Checkpoints that transformers converts while loading: merges by mergekit's command, by value.

The Fisher is made up and merged by hand tensor by tensor *in the files' layout*; what the merged
model holds after `from_pretrained` has to be what transformers loads from files with that result.
"""

import shutil

import merge_oracle
import pytest
import torch
import transformers
from models import (
    FAMILIES,
    make_measured,
    make_model,
    random_fishers,
    read,
    rewrite,
    write_fishers,
)
from running import merged, mergekit_yaml, recipe_of
from transformers import conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter

from fisher_mergekit.errors import PlanningError

pytestmark = pytest.mark.slow  # exhaustive: not needed at every change


def parameters(folder, family):
    """Return what transformers loads, of which nothing may be drawn at random."""
    model, info = getattr(transformers, FAMILIES[family][0]).from_pretrained(
        folder, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    return dict(model.named_parameters())


def expected_of(folder, tensors, family, tmp_path):
    """Return what transformers loads from a model's folder with these tensors in its files."""
    shutil.copytree(folder, tmp_path / "expected", ignore=shutil.ignore_patterns("sidecar"))
    rewrite(tmp_path / "expected", tensors)
    return parameters(tmp_path / "expected", family)


def assert_same(found, expected):
    assert sorted(found) == sorted(expected)
    for name, parameter in expected.items():
        torch.testing.assert_close(
            found[name], parameter, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("mixtral", {"num_local_experts": 12}),
        pytest.param("qwen3_moe", {"num_experts": 12}, marks=pytest.mark.slow),
        pytest.param("olmoe", {}, marks=pytest.mark.slow),
        pytest.param("granite_moe", {}, marks=pytest.mark.slow),
        pytest.param("qwen2_vl", {}, marks=pytest.mark.slow),
        # mergekit alone drops its language model
        pytest.param("llava", {}, marks=pytest.mark.slow),
        pytest.param("vit", {}, marks=pytest.mark.slow),  # and its layers
    ],
)
def test_merged_as_by_hand(tmp_path, family, config):
    a, theta_a, fisher_a = make_measured(tmp_path / "a", family, seed=1, **config)
    b, theta_b, fisher_b = make_measured(tmp_path / "b", family, seed=2, scale=1e3, **config)
    assert set(theta_a) - set(parameters(a, family)), "nothing is converted"
    process, out = mergekit_yaml(recipe_of(a, b, lambdas=[0.7, 0.3]), tmp_path)
    assert process.returncode == 0, process.stderr

    expected = merge_oracle.merge(
        [theta_a, theta_b], [fisher_a, fisher_b], [0.7, 0.3], list(theta_a)
    )
    assert_same(parameters(out, family), expected_of(a, expected, family, tmp_path))


def test_a_merge_is_a_model_to_measure_and_merge_again(tmp_path):
    """Its files are in the layout of memory, another model's are not; both are one merge."""
    a, theta_a, _ = make_measured(tmp_path / "a", "mixtral", seed=1)
    b, theta_b, fisher_b = make_measured(tmp_path / "b", "mixtral", seed=2)
    packed = tmp_path / "packed"
    merged(recipe_of(a, lambdas=[1.0]), packed)
    assert "model.layers.0.mlp.experts.gate_up_proj" in read(packed)
    fisher_packed = random_fishers(packed, 5)
    write_fishers(packed, fisher_packed)

    both = merged(recipe_of(packed, b, lambdas=[0.4, 0.6]), tmp_path / "out")

    def one_by_one(tensors):
        """Give a packed model's tensors the names and shapes of the other files."""
        split = dict(tensors)
        for layer in range(2):
            here, there = f"model.layers.{layer}.mlp", f"model.layers.{layer}.block_sparse_moe"
            split[f"{there}.gate.weight"] = split.pop(f"{here}.gate.weight")
            pairs = split.pop(f"{here}.experts.gate_up_proj").chunk(2, dim=1)
            downs = split.pop(f"{here}.experts.down_proj")
            for expert in range(2):
                split[f"{there}.experts.{expert}.w1.weight"] = pairs[0][expert]
                split[f"{there}.experts.{expert}.w3.weight"] = pairs[1][expert]
                split[f"{there}.experts.{expert}.w2.weight"] = downs[expert]
        return split

    assert sorted(one_by_one(fisher_packed)) == sorted(fisher_b)
    expected = merge_oracle.merge(
        [theta_a, theta_b], [one_by_one(fisher_packed), fisher_b], [0.4, 0.6], list(theta_b)
    )
    for name, tensor in one_by_one(both).items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-5)


def test_a_sidecar_that_lacks_one_expert_is_partial(tmp_path):
    models = [make_measured(tmp_path / n, "mixtral", seed=i)[0] for i, n in enumerate("ab")]
    fishers = random_fishers(models[1], 1)
    lost = "model.layers.1.block_sparse_moe.experts.1.w3.weight"
    del fishers[lost]
    shutil.rmtree(models[1] / "sidecar")
    write_fishers(models[1], fishers)
    with pytest.raises(PlanningError, match=f"is partial: it says nothing of {lost}"):
        merged(recipe_of(*models), tmp_path / "out")


def test_an_expert_that_was_trained_further_is_foreign(tmp_path):
    models = [make_measured(tmp_path / n, "mixtral", seed=i)[0] for i, n in enumerate("ab")]
    changed = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    rewrite(models[0], {**read(models[0]), changed: read(models[0])[changed] + 1e-3})
    with pytest.raises(PlanningError, match=f"digest of {changed} differs"):
        merged(recipe_of(*models), tmp_path / "out")


def test_experts_are_excluded_like_any_tensor(tmp_path):
    a, theta_a, fisher_a = make_measured(tmp_path / "a", "mixtral", seed=1)
    b, theta_b, fisher_b = make_measured(tmp_path / "b", "mixtral", seed=2)
    recipe = recipe_of(a, b, base_model=str(a), parameters={"exclude": "mlp.experts"})
    merged(recipe, tmp_path / "out")
    rest = [name for name in theta_a if "experts" not in name]
    average = merge_oracle.merge([theta_a, theta_b], [fisher_a, fisher_b], [1, 1], rest)
    expected = expected_of(a, {**theta_a, **average}, "mixtral", tmp_path)
    assert_same(parameters(tmp_path / "out", "mixtral"), expected)


def test_layers_take_their_experts_along(tmp_path):
    """Layer 1 of one model with layer 0 of the other: each with its own statistics."""
    a, theta_a, fisher_a = make_measured(tmp_path / "a", "mixtral", seed=1)
    b, theta_b, fisher_b = make_measured(tmp_path / "b", "mixtral", seed=2)
    sources = [{"model": str(a), "layer_range": [1, 2]}, {"model": str(b), "layer_range": [0, 1]}]
    recipe = {"merge_method": "fisher", "slices": [{"sources": sources}], "dtype": "float32"}
    merged(recipe, tmp_path / "out")

    def moved(tensors, layer):
        part = f"layers.{layer}."
        kept = {n: t for n, t in tensors.items() if part in n or "layers" not in n}
        return {n.replace(part, "layers.0."): t for n, t in kept.items()}

    names = list(moved(theta_a, 1))
    expected = merge_oracle.merge(
        [moved(theta_a, 1), moved(theta_b, 0)], [moved(fisher_a, 1), moved(fisher_b, 0)],
        [1, 1], names,
    )  # fmt: skip
    shallow = make_model(tmp_path / "shallow", "mixtral", num_hidden_layers=1)
    assert_same(
        parameters(tmp_path / "out", "mixtral"),
        expected_of(shallow, expected, "mixtral", tmp_path),
    )


class Doubled(ConversionOps):
    """A conversion that computes."""

    def convert(self, input_dict, source_patterns, target_patterns, **_):
        (tensors,) = input_dict.values()
        return {target_patterns[0]: tensors[0] * 2}


def test_a_conversion_that_computes_is_refused(tmp_path, monkeypatch):
    models = [make_measured(tmp_path / n, "llama", seed=i)[0] for i, n in enumerate("ab")]
    for folder in models:
        changed = {n.replace("up_proj", "upward"): t for n, t in read(folder).items()}
        rewrite(folder, changed)
        write_fishers(folder, random_fishers(folder, 0))
    converter = WeightConverter("mlp.upward.weight", "mlp.up_proj.weight", [Doubled()])
    known = conversion_mapping.get_checkpoint_conversion_mapping
    monkeypatch.setattr(
        conversion_mapping,
        "get_checkpoint_conversion_mapping",
        lambda key: [converter] if key == "llama" else known(key),
    )
    with pytest.raises(PlanningError) as info:
        merged(recipe_of(*models), tmp_path / "out")
    assert len(info.value.problems) == 2
    for folder, message in zip(models, info.value.problems, strict=True):
        assert message.startswith(f"{folder}: transformers computes model.layers.0.mlp.up_proj")
