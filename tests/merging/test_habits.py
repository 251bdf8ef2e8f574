"""What people write in recipes by habit or mistake, and no merge must take for something else."""

from __future__ import annotations

import shutil

import merge_oracle
import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.scripts.run_yaml import main as mergekit_yaml
from models import make_measured, read, rewrite, write_fishers
from running import assert_close, merged, recipe_of

from fisher_mergekit.errors import CheckpointError, PlanningError
from fisher_mergekit.precision import fisher, solve


@pytest.fixture
def pair(tmp_path):
    """Return two measured classifiers: their folder, weights and Fishers."""
    return [make_measured(tmp_path / name, seed=i) for i, name in enumerate("ab")]


def refusal(recipe, out):
    with pytest.raises(PlanningError) as info:
        run_merge(MergeConfiguration.model_validate(recipe), str(out), MergeOptions(quiet=True))
    assert not out.exists()
    return str(info.value)


def test_excluding_everything_is_no_merge(pair, tmp_path):
    a, b = (folder for folder, *_ in pair)
    recipe = recipe_of(a, b, base_model=str(a), parameters={"exclude": ["bert", "classifier"]})
    assert "keeps every tensor out" in refusal(recipe, tmp_path / "out")


def test_what_mergekit_drops_from_the_file_is_refused(pair, tmp_path):
    """A lambda that does not count would be another merge, and nobody would see it."""
    a, b = (folder for folder, *_ in pair)
    recipe = recipe_of(a, b, dtyp="float32")
    recipe["models"][0]["lambda"] = 0.7
    path, out = tmp_path / "recipe.yml", tmp_path / "out"
    path.write_text(yaml.safe_dump(recipe))
    result = CliRunner().invoke(mergekit_yaml, [str(path), str(out), "--quiet"])
    assert result.exit_code != 0
    assert f"'lambda' of {a} has no effect there; write it under `parameters:`." in result.output
    assert "unknown key 'dtyp'. Did you mean 'dtype'?" in result.output
    assert not out.exists()
    recipe["models"][0]["note"] = recipe["models"][0].pop("lambda")
    recipe["dtype"] = recipe.pop("dtyp")
    path.write_text(yaml.safe_dump(recipe))
    result = CliRunner().invoke(mergekit_yaml, [str(path), str(out), "--quiet"])
    assert result.exit_code == 0, result.output


def test_the_command_that_mends_has_the_recipe_as_it_was_typed(pair, tmp_path):
    (a, *_), (b, *_) = pair
    shutil.rmtree(a / "sidecar")
    content = yaml.safe_dump(recipe_of(a, b))
    path = tmp_path / "my recipe.yml"
    path.write_text(content)
    result = CliRunner().invoke(mergekit_yaml, [str(path), str(tmp_path / "out"), "--quiet"])
    assert f"Run: mergekit-fisher precompute '{path}'\n" in result.output
    # After it, what merges in this process is of no file.
    assert "Run: mergekit-fisher precompute RECIPE" in refusal(
        yaml.safe_load(content), tmp_path / "out"
    )


@pytest.mark.parametrize("dtype", ["torch.float32", "fp16", "float8_e4m3fn"])
def test_a_dtype_that_transformers_could_not_load(pair, tmp_path, dtype):
    recipe = recipe_of(*(folder for folder, *_ in pair), dtype=dtype)
    said = refusal(recipe, tmp_path / "out")
    assert f"dtype: {dtype!r} is not one of float32, float16, bfloat16, float64." in said


def test_a_base_model_in_another_spelling_is_shown(pair, tmp_path):
    a, b = (folder for folder, *_ in pair)
    recipe = recipe_of(a, b, base_model=f"{a}/", parameters={"favor_base": True})
    said = refusal(recipe, tmp_path / "out")
    assert f"{a}/ is none of {a}, {b}. List it under `models:`, in the same spelling" in said


def test_a_model_s_folder_named_as_sidecar_is_told_where_it_is(pair, tmp_path):
    a, b = (folder for folder, *_ in pair)
    recipe = recipe_of(a, b)
    recipe["models"][0]["parameters"] = {"sidecar": str(a)}
    said = refusal(recipe, tmp_path / "o")
    assert (
        f"no sidecar at {a}. There is one at {a / 'sidecar'}: write `sidecar: {a / 'sidecar'}`"
        in said
    )


def test_an_excluded_tensor_that_overflows_is_an_error(pair, tmp_path):
    (a, theta, fishers), (b, *_) = pair
    theta["classifier.bias"] += 1e5
    rewrite(a, theta)
    write_fishers(a, fishers)
    parameters = {"exclude": "classifier"}
    recipe = recipe_of(a, b, base_model=str(a), dtype="float16", parameters=parameters)
    with pytest.raises(CheckpointError, match=r"classifier\.bias of .* does not fit into"):
        merged(recipe, tmp_path / "out")


def test_a_huge_floor_gives_the_lambda_weighted_mean(pair, tmp_path):
    (a, theta_a, _), (b, theta_b, _) = pair
    recipe = recipe_of(a, b, parameters={"floor": 1e300})
    mean = {name: (theta_a[name] + theta_b[name]) / 2 for name in theta_a}
    assert_close(merged(recipe, tmp_path / "out"), mean)


def test_models_stored_in_float64_are_merged_in_float64():
    generator = torch.Generator().manual_seed(0)
    thetas = [torch.randn(50, generator=generator, dtype=torch.float64) for _ in range(2)]
    fishers = [torch.rand(50, generator=generator) for _ in range(2)]
    found = solve("fisher", thetas, [(f,) for f in fishers], [0.3, 0.7], scales=[0.1, 0.9])
    expected = merge_oracle.merge_tensor(
        thetas, [f.double() for f in fishers], [0.3, 0.7], [0.1, 0.9], floor=fisher.FLOOR
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_model_in_two_spellings_counts_as_often(pair, tmp_path):
    (a, *_), (b, *_) = pair
    once = merged(recipe_of(a, b, parameters={"lambda": 1}), tmp_path / "once")
    twice = recipe_of(a, f"{a}/", b)
    for entry, value in zip(twice["models"], (0.5, 0.5, 1.0), strict=True):
        entry["parameters"] = {"lambda": value}
    assert_close(merged(twice, tmp_path / "twice"), once)
    assert read(tmp_path / "once").keys() == read(tmp_path / "twice").keys()


def test_a_sidecar_named_for_one_spelling_is_the_other_s_too(pair, tmp_path):
    (a, *_), (b, *_) = pair
    (a / "sidecar").rename(tmp_path / "measured")
    recipe = recipe_of(f"{a}/", a, b)
    recipe["models"][1]["parameters"] = {"sidecar": str(tmp_path / "measured")}
    recipe["models"][2]["parameters"] = {"lambda": 2}
    found = merged(recipe, tmp_path / "out")
    (tmp_path / "measured").rename(a / "sidecar")
    assert_close(found, merged(recipe_of(a, b), tmp_path / "once"))


def test_a_tied_tensor_under_two_names_weighs_as_under_one(tmp_path):
    tied = {"tie_word_embeddings": True}
    a, theta, fishers = make_measured(tmp_path / "a", "llama", seed=0, **tied)
    b, *_ = make_measured(tmp_path / "b", "llama", seed=1, **tied)
    once = merged(recipe_of(a, b), tmp_path / "once")
    twin, name = "lm_head.weight", "model.embed_tokens.weight"
    both, *_ = make_measured(tmp_path / "both", "llama", seed=0, **tied)
    rewrite(both, {**theta, twin: theta[name].clone()})
    write_fishers(both, {**fishers, twin: fishers[name].clone()})
    twice = merged(recipe_of(both, b), tmp_path / "twice")
    assert_close({n: t for n, t in twice.items() if n != twin}, once)
    assert torch.equal(twice[twin], twice[name])
