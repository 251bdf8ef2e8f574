"""Merges by mergekit's own command, against Fisher merges computed by hand."""

import shutil

import merge_oracle
import pytest
import torch
import transformers
import yaml
from models import make_measured, make_model, random_fishers, read, rewrite, write_fishers
from running import assert_close, command, merged, mergekit_yaml, recipe_of

HEADS = {
    "bert": ["classifier"],
    "roberta": ["classifier"],
    "distilbert": ["classifier"],  # takes pre_classifier too
}


def check(process, out, expected, **tolerance):
    assert process.returncode == 0, process.stderr
    assert_close(read(out), expected, **tolerance)


@pytest.mark.parametrize(
    "family",
    [
        "bert",
        pytest.param("roberta", marks=pytest.mark.slow),
        pytest.param("distilbert", marks=pytest.mark.slow),
    ],
)
def test_heads_of_different_size(tmp_path, family):
    a, theta_a, fisher_a = make_measured(tmp_path / "a", family, seed=1, num_labels=2)
    b, theta_b, fisher_b = make_measured(tmp_path / "b", family, seed=2, num_labels=3, scale=1e-9)
    recipe = recipe_of(
        a, b, lambdas=[0.7, 0.3], base_model=str(a), parameters={"exclude": HEADS[family]}
    )
    process, out = mergekit_yaml(recipe, tmp_path)

    body = [name for name in theta_a if "classifier" not in name]
    expected = merge_oracle.merge([theta_a, theta_b], [fisher_a, fisher_b], [0.7, 0.3], body)
    check(process, out, {**theta_a, **expected})
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        out, output_loading_info=True
    )
    assert model.num_labels == 2
    assert not info["missing_keys"]
    assert "task head" not in process.stderr


@pytest.mark.slow
def test_head_missing_from_the_other_models_files(tmp_path):
    a, theta_a, fisher_a = make_measured(tmp_path / "a", seed=1)
    b, theta_b, _ = make_measured(tmp_path / "b", seed=2)
    theta_b = {n: t for n, t in theta_b.items() if "classifier" not in n}
    rewrite(b, theta_b)
    fisher_b = random_fishers(b, 2)
    write_fishers(b, fisher_b)
    recipe = recipe_of(a, b, base_model=str(a), parameters={"exclude": "classifier"})
    process, out = mergekit_yaml(recipe, tmp_path)

    expected = merge_oracle.merge(
        [theta_a, theta_b], [fisher_a, fisher_b], [1.0, 1.0], list(theta_b)
    )
    check(process, out, {**theta_a, **expected})


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_language_models_untied_and_tied(tmp_path, family):
    a, theta_a, fisher_a = make_measured(tmp_path / "a", family, seed=1)
    b, theta_b, fisher_b = make_measured(tmp_path / "b", family, seed=2, scale=100.0)
    assert ("lm_head.weight" in theta_a) == (family == "llama")
    process, out = mergekit_yaml(recipe_of(a, b, lambdas=[0.2, 2.0]), tmp_path)

    expected = merge_oracle.merge(
        [theta_a, theta_b], [fisher_a, fisher_b], [0.2, 2.0], list(theta_a)
    )
    check(process, out, expected)
    _, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert "task head" not in process.stderr


@pytest.mark.parametrize("is_tied", [True, False])
def test_an_excluded_head_is_as_base_model_has_it(tmp_path, is_tied):
    """Also if it has none of its own, and its words' table is the head."""
    options = [{"tie_word_embeddings": is_tied}, {"tie_word_embeddings": not is_tied}]
    (a, theta_a, fisher_a), (b, theta_b, fisher_b) = (
        make_measured(tmp_path / name, "llama", seed=i, **own)
        for i, (name, own) in enumerate(zip("ab", options, strict=True))
    )
    head = "lm_head.weight"
    assert (head in theta_a, head in theta_b) == (not is_tied, is_tied)
    recipe = recipe_of(a, b, base_model=str(a), parameters={"exclude": [head]})
    shared = sorted(theta_a.keys() & theta_b.keys())
    expected = merge_oracle.merge([theta_a, theta_b], [fisher_a, fisher_b], [1.0, 1.0], shared)
    assert_close(merged(recipe, tmp_path / "out"), {**theta_a, **expected})
    _, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]


@pytest.mark.slow
def test_names_without_prefix_sharded_in_bfloat16(tmp_path):
    """One model's files call everything otherwise; statistics follow the names in the files."""
    a, theta_a, fisher_a = make_measured(
        tmp_path / "a", "gpt2", seed=1, dtype=torch.bfloat16, shard_size="4KB"
    )
    assert len(list(a.glob("model-*.safetensors"))) > 1
    b = make_model(tmp_path / "b", "gpt2", seed=2, dtype=torch.bfloat16)
    short = {name.removeprefix("transformer."): t for name, t in read(b).items()}
    rewrite(b, short)
    fisher_short = random_fishers(b, 2)
    write_fishers(b, fisher_short, shard_size=2000)
    assert len(list((b / "sidecar").glob("fisher-*.safetensors"))) > 1

    recipe = recipe_of(a, b, lambdas=[1.0, 3.0], dtype="bfloat16")
    process, out = mergekit_yaml(recipe, tmp_path, "--out-shard-size", "1K")
    theta_b = {f"transformer.{name}": t for name, t in short.items()}
    fisher_b = {f"transformer.{name}": t for name, t in fisher_short.items()}
    expected = merge_oracle.merge(
        [theta_a, theta_b], [fisher_a, fisher_b], [1.0, 3.0], list(theta_a)
    )
    # Rounded once, from float32 to bfloat16.
    check(process, out, {n: t.bfloat16() for n, t in expected.items()}, rtol=1e-2, atol=1e-5)
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert {t.dtype for t in read(out).values()} == {torch.bfloat16}


@pytest.mark.slow
def test_merge_of_a_merge_by_mergekit_multi(tmp_path):
    a, theta_a, fisher_a = make_measured(tmp_path / "a", "llama", seed=1)
    b, theta_b, fisher_b = make_measured(tmp_path / "b", "llama", seed=2)
    c, theta_c, _ = make_measured(tmp_path / "c", "llama", seed=3)
    first = {"name": "first", **recipe_of(a, b)}
    second = {
        "merge_method": "linear",
        "dtype": "float32",
        "models": [{"model": m, "parameters": {"weight": 1.0}} for m in ("first", str(c))],
    }
    path = tmp_path / "recipes.yml"
    path.write_text(yaml.safe_dump_all([first, second]))
    process = command(
        "mergekit-multi", path, "--out-path", tmp_path / "out", "-I", tmp_path / "steps", "--quiet"
    )
    expected = merge_oracle.merge([theta_a, theta_b], [fisher_a, fisher_b], [1, 1], list(theta_a))
    check(process, tmp_path / "out", {n: (expected[n] + theta_c[n]) / 2 for n in expected})


@pytest.mark.slow
def test_a_merge_inside_mergekit_multi_has_to_be_measured_by_name(tmp_path):
    a, b = (make_measured(tmp_path / n, "llama", seed=i)[0] for i, n in enumerate("ab"))
    path, steps = tmp_path / "recipes.yml", tmp_path / "steps"
    second = recipe_of("first", a)
    path.write_text(yaml.safe_dump_all([{"name": "first", **recipe_of(a, b)}, second]))
    process = command(
        "mergekit-multi", path, "--out-path", tmp_path / "out", "-I", steps, "--quiet"
    )
    assert process.returncode != 0
    assert f"Run: mergekit-fisher precompute --model {steps / 'first'} --path" in process.stderr


@pytest.mark.slow
def test_problems_are_printed_without_a_traceback(tmp_path):
    a, _, _ = make_measured(tmp_path / "a", seed=1, num_labels=2)
    b, _, _ = make_measured(tmp_path / "b", seed=2, num_labels=3)
    shutil.rmtree(b / "sidecar")
    recipe = recipe_of(a, b, lambdas=[-1.0, 1.0], base_model=str(a), parameters={"flor": 1})
    process, out = mergekit_yaml(recipe, tmp_path)
    assert process.returncode == 1
    assert "Traceback" not in process.stderr
    message = process.stderr[process.stderr.index("Error: ") :]
    assert message.startswith("Error: 4 problems:\n  1. ")
    assert "unknown parameter 'flor'. Did you mean 'floor'?" in message
    assert f"lambda of {a} is -1.0" in message
    assert "the line `exclude: [classifier]`." in message
    assert f"there is no sidecar at {b / 'sidecar'}. Run: mergekit-fisher precompute" in message
    assert not out.exists()
