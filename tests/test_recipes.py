"""Every recipe in `recipes/` runs as it stands, through both commands, on tiny models."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pandas
import pytest
import torch
import yaml
from click.testing import CliRunner
from models import make_model, read
from running import command
from tokenizers_of_words import WORDS, give_tokenizer

from fisher_mergekit.cli.precompute import precompute
from fisher_mergekit.methods import METHODS
from fisher_mergekit.precision import fisher, solve
from fisher_mergekit.sidecar.reader import Sidecar

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yml"))
LABELS = {"./mnli": 3}
"""Heads that are not of two labels."""


def prepare(recipe: dict) -> None:
    """Make the models and the data that a recipe names, in the current directory."""
    for number, entry in enumerate(recipe["models"]):
        calibration = {**recipe.get("calibration", {}), **entry["calibration"]}
        folder = Path(entry["model"])
        if "label" in calibration:
            make_model(folder, seed=number, num_labels=LABELS.get(entry["model"], 2))
        else:
            make_model(folder, "llama", seed=number)
        give_tokenizer(folder, chat="messages" in calibration, pairs="label" in calibration)
        write_data(calibration, seed=number)


def write_data(calibration: dict, seed: int) -> None:
    """Write a few made-up examples with the columns that the recipe names."""
    chance = random.Random(seed)

    def words() -> str:
        return " ".join(chance.choices(WORDS, k=chance.randint(1, 6)))

    columns = calibration.get("text", ())
    rows = []
    for number in range(6):
        row: dict = {name: words() for name in ([columns] if isinstance(columns, str) else columns)}
        if "messages" in calibration:
            turns = [("user", words()), ("assistant", words())]
            row[calibration["messages"]] = [{"role": r, "content": c} for r, c in turns]
        if "label" in calibration:
            row[calibration["label"]] = number % 2
        rows.append(row)
    path = Path(calibration["path"])
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix == ".txt":
        path.write_text("\n\n".join(row["text"] for row in rows))
    elif path.suffix == ".csv":
        pandas.DataFrame(rows).to_csv(path, index=False)
    else:
        pandas.DataFrame(rows).to_parquet(path)


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_measured_once_and_merged_as_written(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    recipe = yaml.safe_load(path.read_text())
    prepare(recipe)

    first = CliRunner().invoke(precompute, [str(path)], catch_exceptions=False)
    assert first.exit_code == 0, first.output
    assert "Measured 2 of 2 models" in first.output
    again = CliRunner().invoke(precompute, [str(path)], catch_exceptions=False)
    assert "Measured 0 of 2 models" in again.output
    done = command("mergekit-yaml", path, "merged", "--quiet")
    assert done.returncode == 0, done.stderr

    merged = read(Path("merged"))
    models = [Path(entry["model"]) for entry in recipe["models"]]
    last = ("layers.1.mlp.up_proj.weight", "layer.1.intermediate.dense.weight")
    name = next(n for n in merged if n.endswith(last))
    lambdas = [last_lambda(entry.get("parameters", {})) for entry in recipe["models"]]
    kept = recipe.get("parameters", {}).get("exclude", [])
    kind = METHODS[recipe["merge_method"]].kind
    measured = [Sidecar(model / "sidecar", kind) for model in models]
    options: dict = {} if kind == "gram" else {"scales": [scale(x, kept) for x in measured]}
    if recipe.get("parameters", {}).get("favor_base"):
        options["favor"] = 0
    expected = solve(
        kind,
        [read(model)[name] for model in models],
        [tuple(map(sidecar.load, sidecar.stored(name))) for sidecar in measured],
        lambdas,
        **options,
    )
    torch.testing.assert_close(merged[name], expected.to(merged[name].dtype), rtol=1e-5, atol=1e-6)
    for head in (n for n in merged if any(part in n for part in kept)):
        torch.testing.assert_close(merged[head], read(Path(recipe["base_model"]))[head])


def last_lambda(parameters: dict) -> float:
    """Return the lambda of the last layer: a gradient ends in it."""
    value = parameters.get("lambda", parameters.get("weight", 1.0))
    if isinstance(value, list):
        value = value[-1]["value"][-1]
    return float(value)


def scale(sidecar: Sidecar, kept: list[str]) -> float:
    """Return the root mean square over what is merged."""
    weights = sidecar.measurement.weights
    names = [name for name in sidecar.weights if not any(part in name for part in kept)]
    names = [name for name in names if not ("embed" in name and sidecar.kind == "kfac")]
    squares = sum(math.prod(map(sidecar.sum_of_squares, sidecar.stored(n))) for n in names)
    return fisher.root_mean_square(squares, sum(math.prod(weights[n].shape) for n in names))


def test_every_recipe_is_short_and_says_what_it_is_for() -> None:
    assert len(RECIPES) >= 8
    for path in RECIPES:
        lines = path.read_text().splitlines()
        assert lines[0].startswith("# "), path.name
        assert len(lines) <= 20, path.name
