"""Every recipe in `recipes/` runs as it stands, by the commands it names, on tiny models.

What comes out is compared with the one equation, tensor by tensor in the layout of the models'
files, so that also what transformers packs while loading is.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import shlex
import shutil
from pathlib import Path

import dense_oracle
import merge_oracle
import pandas
import pytest
import torch
import transformers
import yaml
from adapters import make_adapter
from click.testing import CliRunner
from mergekit.common import ModelReference
from models import Tensors, make_model, read, rewrite
from running import command
from tokenizers_of_words import WORDS, give_tokenizer

from fisher_mergekit.cli.precompute import precompute
from fisher_mergekit.methods import METHODS
from fisher_mergekit.precision import fisher
from fisher_mergekit.sidecar.location import reading_places
from fisher_mergekit.sidecar.reader import Sidecar

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yml"))
EVERYWHERE_ALIKE = [path for path in RECIPES if path.stem not in ("frankenmerge", "prior")]
LABELS = {"./mnli": 3}
"""Heads that are not of two labels."""


def commands(path: Path) -> list[list[str]]:
    """Return the commands that the recipe's comments name, or else the two of every recipe."""
    named = [shlex.split(x) for x in re.findall(r"^#   (mergekit.*)$", path.read_text(), re.M)]
    for usual in (f"mergekit-fisher precompute {path.name}", f"mergekit-yaml {path.name} merged"):
        if not any(words[0] == usual.split()[0] for words in named):
            named.append(usual.split())
    return named


def prepare(recipe: dict) -> None:
    """Make the models and the data that a recipe names, in the current folder."""
    entries = measured(recipe)
    layers = max((s["layer_range"][1] for s in sources(recipe)), default=2)
    for number, entry in enumerate(entries):
        calibration = {**recipe.get("calibration", {}), **entry["calibration"]}
        model, _, adapter = entry["model"].partition("+")
        base, options = Path(model), {}
        if "label" in calibration or "sentiment" in model:  # RegMean needs none
            family, options = "bert", {"num_labels": LABELS.get(model, 2)}
        else:
            family = "mixtral" if "moe" in model else "llama"
            options = {"num_hidden_layers": layers}
        if not base.exists():
            make_model(base, family, seed=number, **options)
            give_tokenizer(base, chat="messages" in calibration, pairs=family == "bert")
        if adapter:
            make_adapter(Path(adapter), base, model_class="LlamaForCausalLM", seed=number,
                         target_modules=["q_proj", "v_proj"])  # fmt: skip
        write_data(calibration, seed=number)
    if "base_model" in recipe and not Path(recipe["base_model"]).exists():
        raise AssertionError("a base_model that is measured nowhere")


def measured(recipe: dict) -> list[dict]:
    """Return the recipe's models, where their data is named; and the base if it is a prior."""
    entries = [*recipe.get("models", ()), *(s for s in sources(recipe) if "calibration" in s)]
    if recipe.get("parameters", {}).get("prior"):
        entries.append({"model": recipe["base_model"], "calibration": {}})
    return entries


def sources(recipe: dict) -> list[dict]:
    return [source for piece in recipe.get("slices", ()) for source in piece["sources"]]


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


def run(path: Path, tmp_path: Path, patch: pytest.MonkeyPatch) -> tuple[dict, list[list[str]]]:
    """Measure and merge by a recipe in a folder of its own; return it, and the commands."""
    patch.chdir(tmp_path)
    patch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    shutil.copy(path, tmp_path)
    recipe, asked = yaml.safe_load(path.read_text()), commands(path)
    prepare(recipe)
    for words in asked:
        if words[0] == "mergekit-yaml":
            done = command(*words, "--quiet")
            assert done.returncode == 0, done.stderr
            continue
        first = CliRunner().invoke(precompute, words[2:], catch_exceptions=False)
        assert first.exit_code == 0, first.output
        count = len(measured(recipe))
        assert f"Measured {count} of {count} model" in first.output
        again = CliRunner().invoke(precompute, words[2:], catch_exceptions=False)
        assert f"Measured 0 of {count} model" in again.output
    return recipe, asked


class Input:
    """One model of a recipe, as it was merged.

    Args:
        entry: the recipe's.
        loras: where mergekit keeps models with adapters.
    """

    def __init__(self, entry: dict, loras: str | None):
        reference = ModelReference.model_validate(entry["model"])
        self.folder = Path(reference.merged(cache_dir=loras).model.path)
        self.weights = read(self.folder)
        self.parameters = entry.get("parameters", {})
        owner = reference.lora or reference.model
        base = str(reference.model) if reference.lora else None
        self.place = reading_places(owner.path, None, Path(owner.path), base)[0]

    def sidecar(self, kind: str) -> Sidecar:
        return Sidecar(self.place, kind)

    def lam(self, name: str) -> float:
        """Return lambda of a tensor, of a model of two layers."""
        value = self.parameters.get("lambda", self.parameters.get("weight", 1.0))
        if isinstance(value, list):
            value = next(x["value"] for x in value if x.get("filter", "") in name)
        if isinstance(value, list):
            value = value[-1] if "layer.1." in name else value[0]
        return float(value)


def expected_tensors(recipe: dict, inputs: list[Input]) -> Tensors:
    """Merge by the equation what the recipe does not exclude, in the layout of the files."""
    parameters = recipe.get("parameters", {})
    kept = parameters.get("exclude", [])
    names = [n for n in inputs[0].weights if not any(part in n for part in kept)]
    kinds = [METHODS[recipe["merge_method"]].kind]
    if parameters.get("others") == "fisher":
        kinds.append("fisher")
    merged: Tensors = {}
    rest = names
    for kind in kinds:
        sidecars = [x.sidecar(kind) for x in inputs]
        mine = [n for n in rest if n in sidecars[0].weights]
        if kind != "fisher":  # a table of tokens is merged otherwise, unless the recipe says so
            mine = [n for n in mine if "embed" not in n]
        scales = [scale(sidecar, mine) for sidecar in sidecars]
        favor = 0 if parameters.get("favor_base") else None
        for name in mine:
            thetas, lambdas = [x.weights[name] for x in inputs], [x.lam(name) for x in inputs]
            stored = [list(map(s.load, s.stored(name))) for s in sidecars]
            if kind == "fisher":
                fishers = [values for (values,) in stored]
                merged[name] = merge_oracle.merge_tensor(
                    thetas, fishers, lambdas, scales, favor=favor
                )
            else:
                merged[name] = by_factors(kind, thetas, stored, lambdas, scales)
        rest = [n for n in rest if n not in mine]
    for name in rest:
        lambdas = [x.lam(name) for x in inputs]
        weighted = [lam * x.weights[name].double() for lam, x in zip(lambdas, inputs, strict=True)]
        merged[name] = sum(weighted) / sum(lambdas)
    return merged


def by_factors(
    kind: str,
    thetas: list[torch.Tensor],
    stored: list[list[torch.Tensor]],
    lambdas: list[float],
    scales: list[float],
) -> torch.Tensor:
    """Merge a linear layer by its factors, with each Cᵢ written down whole."""
    matrices = [
        dense_oracle.gram(thetas[0].shape, factors, lam)
        if kind == "gram"
        else dense_oracle.kfac(thetas[0].shape, factors, lam, scale=size)
        for factors, lam, size in zip(stored, lambdas, scales, strict=True)
    ]
    return dense_oracle.solution(matrices, thetas)


def scale(sidecar: Sidecar, names: list[str]) -> float:
    """Return the root mean square over what is merged by the kind."""
    weights = sidecar.measurement.weights
    squares = sum(math.prod(map(sidecar.sum_of_squares, sidecar.stored(n))) for n in names)
    return fisher.root_mean_square(squares, sum(math.prod(weights[n].shape) for n in names))


def loaded(folder: Path) -> Tensors:
    """Return what transformers makes of a model's files, of which nothing may be missing."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model, info = getattr(transformers, config.architectures[0]).from_pretrained(
        folder, output_loading_info=True
    )
    assert not info["missing_keys"]
    return dict(model.state_dict())


def check(found: Tensors, expected: Tensors) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        half = found[name].dtype == torch.bfloat16  # rounding may fall to either side
        torch.testing.assert_close(
            found[name].float(),
            tensor.float(),
            msg=lambda m, name=name: f"{name}: {m}",
            **({"rtol": 8e-3, "atol": 1e-4} if half else {"rtol": 1e-5, "atol": 1e-5}),
        )


@pytest.mark.slow
@pytest.mark.parametrize("path", EVERYWHERE_ALIKE, ids=lambda path: path.stem)
def test_a_recipe_is_measured_once_and_merged_as_written(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, asked = run(path, tmp_path, monkeypatch)
    flags = dict(itertools.pairwise(asked[-1]))
    inputs = [Input(entry, flags.get("--lora-merge-cache")) for entry in recipe["models"]]
    expected = expected_tensors(recipe, inputs)
    # The result has the layout of base_model, and of it what is not merged.
    base = Path(recipe["base_model"])
    shutil.copytree(base, "expected")
    heads = {n: t for n, t in read(base).items() if n not in expected}
    assert bool(heads) == ("exclude" in recipe.get("parameters", {}))
    rewrite(Path("expected"), {**expected, **heads})
    check(loaded(Path("merged")), loaded(Path("expected")))
    for one in inputs:
        assert any((expected[n] - one.weights[n]).abs().max() > 1e-3 for n in expected)


@pytest.mark.slow
def test_a_frankenmerge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, _ = run(FOLDER / "frankenmerge.yml", tmp_path, monkeypatch)
    news, code = (Input({"model": f"./{name}-llm"}, None) for name in ("news", "code"))
    layers = [
        [(source["model"], source["layer_range"][0] + i) for source in piece["sources"]]
        for piece in recipe["slices"]
        for i in range(source_length(piece))
    ]
    assert [len(pair) for pair in layers] == [1] * 4 + [2] * 4 + [1] * 6
    of = {"./news-llm": news, "./code-llm": code}
    found = read(Path("merged"))
    alone = {news: ["model.embed_tokens.weight"], code: ["model.norm.weight", "lm_head.weight"]}
    expected = {name: one.weights[name] for one, names in alone.items() for name in names}
    pattern = re.compile(r"layers\.(\d+)\.")
    kinds = sorted({pattern.sub("layers.{}.", n) for n in news.weights if "layers." in n})
    used: dict[Input, list[str]] = {news: [], code: []}
    for model, layer in itertools.chain.from_iterable(pair for pair in layers if len(pair) == 2):
        used[of[model]] += [n.format(layer) for n in kinds]
    scales = {one: scale(one.sidecar("fisher"), names) for one, names in used.items()}
    for out, pair in enumerate(layers):
        for name in kinds:
            thetas = [of[model].weights[name.format(layer)] for model, layer in pair]
            expected[name.format(out)] = thetas[0]
            if len(pair) == 2:
                fishers = [of[m].sidecar("fisher").load(name.format(i)) for m, i in pair]
                expected[name.format(out)] = merge_oracle.merge_tensor(
                    thetas, fishers, [0.6, 0.4], [scales[of[m]] for m, _ in pair]
                )
    check(found, expected)
    assert transformers.AutoConfig.from_pretrained("merged").num_hidden_layers == 14
    loaded(Path("merged"))


def source_length(piece: dict) -> int:
    first, last = piece["sources"][0]["layer_range"]
    return int(last - first)


@pytest.mark.slow
def test_experts_with_a_prior(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """θ₀ + (F₀ + Σ λ F)⁻¹ Σ λ (F₀ + F) (θ − θ₀), of Fishers over their scales."""
    recipe, _ = run(FOLDER / "prior.yml", tmp_path, monkeypatch)
    base = Input({"model": "./base"}, None)
    experts = [Input(entry, None) for entry in recipe["models"]]
    names = list(base.weights)

    def fishers(one: Input) -> Tensors:
        sidecar = one.sidecar("fisher")
        return {n: sidecar.load(n).double() / scale(sidecar, names) for n in names}

    prior, own = fishers(base), [fishers(one) for one in experts]
    expected = {}
    for name in names:
        f0, theta0 = prior[name] + fisher.FLOOR, base.weights[name].double()
        total = f0 + 0.7 * sum(f[name] for f in own)
        moved = sum(
            0.7 * (f0 + f[name]) * (one.weights[name].double() - theta0)
            for f, one in zip(own, experts, strict=True)
        )
        expected[name] = theta0 + moved / total
    check(read(Path("merged")), expected)


def test_every_recipe_is_short_and_says_what_it_is_for() -> None:
    assert len(RECIPES) >= 13
    for path in RECIPES:
        lines = path.read_text().splitlines()
        assert lines[0].startswith("# "), path.name
        assert len(lines) <= 15, path.name


def test_the_table_of_recipes_is_whole() -> None:
    linked = re.findall(r"\[([\w-]+)\]\(([\w-]+\.yml)\)", (FOLDER / "README.md").read_text())
    assert sorted(file for _, file in linked) == [path.name for path in RECIPES]
    assert all(file == f"{title}.yml" for title, file in linked)
