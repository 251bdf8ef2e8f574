"""`precompute --optimizer`, and the merge of what it wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from models import Tensors, read
from precomputing import refuse, succeed
from running import assert_close, mergekit_yaml, recipe_of
from tiny import save_model, write_rows
from training import Oracle, load, train

from fisher_mergekit.cli import main
from fisher_mergekit.sidecar.reader import Sidecar

pytestmark = pytest.mark.slow  # exhaustive: not needed at every change


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict[str, Tensors]]:
    """Two trainings from one model, and what their optimizers must have kept: never written to."""
    folder = tmp_path_factory.mktemp("runs")
    start = save_model(folder / "start")
    expected = {}
    for seed, name in enumerate(("one", "two")):
        model = load(start, "bert")
        oracle: Oracle = train(model, "bert", folder / name, seed=seed)
        expected[name] = oracle.in_files(model, folder / f"oracle-{name}")
        # A tokenizer, as the Trainer writes it where it was given one.
        for file in start.glob("token*"):
            shutil.copy(file, folder / name / "checkpoint-4")
    return folder, expected


@pytest.fixture
def folder(runs, tmp_path) -> Path:
    for name in ("one", "two"):
        shutil.copytree(runs[0] / name / "checkpoint-4", tmp_path / name)
    return tmp_path


def optimizer_recipe(folder: Path, **two: object) -> Path:
    models = [
        {"model": str(folder / name), "calibration": {"optimizer": str(folder / name)}}
        for name in ("one", "two")
    ]
    models[1] |= two
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump({"merge_method": "fisher", "models": models}))
    return path


def test_two_trainings_are_merged_by_what_their_optimizers_kept(folder: Path, runs) -> None:
    said = succeed(optimizer_recipe(folder))
    assert f"{folder / 'one'}: read what 4 training steps left, wrote" in said
    assert "Measured 2 of 2 models" in said
    recipe = recipe_of(folder / "one", folder / "two", lambdas=[0.7, 0.3])
    recipe["parameters"] = {"floor": 0.0}
    result, out = mergekit_yaml(recipe, folder / "merge")
    assert result.returncode == 0, result.stderr
    weights = [read(folder / name) for name in ("one", "two")]
    expected = {}
    scales = []
    for name in ("one", "two"):
        kept = torch.cat([v.double().reshape(-1) for v in runs[1][name].values()])
        scales.append(float(kept.square().mean().sqrt()))
    for name in weights[0]:
        shares = [
            share * runs[1][model][name].double() / scale
            for share, model, scale in zip((0.7, 0.3), ("one", "two"), scales, strict=True)
        ]
        total = shares[0] + shares[1]
        mean = 0.7 * weights[0][name] + 0.3 * weights[1][name]
        best = (shares[0] * weights[0][name] + shares[1] * weights[1][name]) / total
        expected[name] = torch.where(total > 0, best, mean.double())
    assert_close(read(out), expected, rtol=1e-4, atol=1e-5)


def test_flags_do_the_same(folder: Path) -> None:
    one = folder / "one"
    succeed("--model", one, "--optimizer", one)
    again = folder / "again"
    succeed("--model", one, "--optimizer", one / "optimizer.pt", "--out", again)
    a, b = Sidecar(one / "sidecar", "fisher"), Sidecar(again, "fisher")
    assert a.measurement.tensors == b.measurement.tensors


def test_a_valid_sidecar_is_kept_and_one_of_another_state_is_not(folder: Path) -> None:
    one = folder / "one"
    arguments = ("--model", one, "--optimizer", one)
    succeed(*arguments)
    assert "is valid, nothing to measure" in succeed(*arguments)
    data = write_rows(folder / "data.jsonl")
    said = refuse("--model", one, "--path", data, "--text", "text")
    assert f"it was taken from an optimizer's state, {one}, now from data." in said
    path = one / "optimizer.pt"
    content = torch.load(path, weights_only=True)
    for state in content["state"].values():
        state["exp_avg_sq"] *= 2
    torch.save(content, path)
    assert "the content of optimizer was" in refuse(*arguments)
    assert "Measured 1 of 1 models" in succeed(*arguments, "--force")


def test_it_is_not_mixed_with_what_was_measured_on_data(folder: Path) -> None:
    data = write_rows(folder / "data.jsonl")
    succeed(optimizer_recipe(folder, calibration={"path": str(data), "text": "text"}))
    result, _ = mergekit_yaml(recipe_of(folder / "one", folder / "two"), folder / "merge")
    assert result.returncode != 0
    assert "adam" in result.stderr
    assert "allow_mixed" in result.stderr


def test_defaults_for_data_do_not_hold_for_an_optimizer(folder: Path) -> None:
    data = write_rows(folder / "data.jsonl")
    path = optimizer_recipe(folder, calibration={})
    content = yaml.safe_load(path.read_text())
    content["calibration"] = {"path": str(data), "text": "text", "sidecar_dtype": "bfloat16"}
    path.write_text(yaml.safe_dump(content))
    succeed(path, "--examples", 3)
    found = {
        name: Sidecar(folder / name / "sidecar", "fisher").measurement.settings
        for name in ("one", "two")
    }
    assert [s.estimator for s in found.values()] == ["adam", "exact"]
    assert [s.examples for s in found.values()] == [None, 3]
    assert {s.dtype for s in found.values()} == {"bfloat16"}


def test_data_in_a_flag_replace_the_optimizer_of_the_recipe(folder: Path) -> None:
    data = write_rows(folder / "data.jsonl")
    succeed(optimizer_recipe(folder), "--path", data, "--text", "text", "--examples", 3)
    header = json.loads((folder / "one" / "sidecar" / "header.json").read_text())
    assert header["kinds"]["fisher"]["settings"]["estimator"] == "exact"


def test_the_page_and_inspect_say_what_it_is(folder: Path) -> None:
    from click.testing import CliRunner

    one = folder / "one"
    succeed("--model", one, "--optimizer", one)
    page = (one / "sidecar" / "README.md").read_text()
    shown = CliRunner().invoke(main, ["inspect", str(one)])
    assert shown.exit_code == 0, shown.output
    assert "Adam's second moment, kept in training, in place of the diagonal Fisher" in page
    assert "steps `4`" in page
    for text in (page, shown.output):
        assert "None" not in text
        assert "examples" not in text.replace("--path DATA", "")
        assert "adam" in text
        assert "batch" in text


@pytest.mark.parametrize(
    ("flags", "phrase"),
    [
        (("--path", "data.jsonl"), "'path' has no effect beside 'optimizer'"),
        (("--examples", "3"), "'examples' has no effect beside 'optimizer'"),
        (("--estimator", "exact"), "'estimator' has no effect beside 'optimizer'"),
    ],
)
def test_data_beside_an_optimizer(folder: Path, flags: tuple, phrase: str) -> None:
    assert phrase in refuse("--model", folder / "one", "--optimizer", folder / "one", *flags)


def test_one_optimizer_for_several_models(folder: Path) -> None:
    recipe = optimizer_recipe(folder)
    said = refuse(recipe, "--optimizer", folder / "one")
    assert "--optimizer is of one model: name the model too" in said


def test_all_that_is_wrong_is_said_at_once(folder: Path) -> None:
    (folder / "one" / "optimizer.pt").write_bytes(b"PK")
    (folder / "two" / "optimizer.pt").unlink()
    said = refuse(optimizer_recipe(folder))
    assert "is cut short" in said
    assert f"{folder / 'two'} has no optimizer.pt" in said


def test_kinds_that_adam_does_not_keep_are_refused_whatever_is_there(folder: Path) -> None:
    """Not after `--force` only, which a sidecar of another source asks for."""
    one, data = folder / "one", write_rows(folder / "data.jsonl")
    succeed("--model", one, "--path", data, "--text", "text", "--kind", "gram,fisher")
    said = refuse("--model", one, "--optimizer", one, "--kind", "gram")
    assert "an optimizer's state has no gram" in said
    said = refuse("--model", one, "--optimizer", one)
    assert f"it was taken from data, now from an optimizer's state, {one}. Measure it" in said
