"""Keys that mergekit drops in silence are refused, wherever they stand, by all its commands."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import merge_oracle
import pytest
import yaml
from click.testing import CliRunner
from mergekit.io.tasks import LoaderCache
from mergekit.scripts import multimerge
from models import make_measured, read
from running import assert_close, command, recipe_of

from fisher_mergekit.recipe import parse_config
from fisher_mergekit.recipe.dropped import dropped_keys

INSTALLED = (Path(sysconfig.get_path("purelib")) / "fisher_mergekit.pth").exists()


@pytest.fixture
def pair(tmp_path):
    """Return two measured models: folders, weights, Fishers."""
    return list(
        zip(*(make_measured(tmp_path / n, seed=i) for i, n in enumerate("ab")), strict=True)
    )


def told(text: str) -> list[str]:
    content = {"merge_method": "fisher", **yaml.safe_load(text)}
    return dropped_keys(parse_config(content, where="here"), content)


MODELS = "models: [{model: ./a}, {model: ./b}]"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("models: [{model: ./a, lamda: 0.7}]",
         "./a: unknown key 'lamda'. Did you mean 'lambda'? Write that under `parameters:`."),
        ("models: [{model: ./a, weights: 0.7}]",
         "./a: unknown key 'weights'. Did you mean 'weight'? Write that under `parameters:`."),
        ("models: [{model: ./a, lambda: 0.7}]",
         "'lambda' of ./a has no effect there; write it under `parameters:`."),
        ("models: [{model: ./a, params: {lambda: 0.7}}]",
         "./a: unknown key 'params'. Did you mean 'parameters'?"),
        ("models: [{model: ./a, layer_range: [0, 4]}]",
         "'layer_range' of ./a has no effect there; mergekit does not look at it."),
        ("models: [{model: ./a, parameters: {lambda: [{filters: mlp, value: 0}, {value: 1}]}}]",
         "lambda of ./a: unknown key 'filters'. Did you mean 'filter'?"),
        ("models: [{model: ./a, parameters: {lambda: {filtr: mlp, value: 0}}}]",
         "lambda of ./a: unknown key 'filtr'. Did you mean 'filter'?"),
        (MODELS + "\nexcludes: [classifier]",
         "the recipe: unknown key 'excludes'. Did you mean 'exclude'? Write that under "
         "`parameters:`."),
        (MODELS + "\ntokenizer: {tokens: {<x>: {source: ./a, forced: true}}}",
         "token '<x>': unknown key 'forced'. Did you mean 'force'?"),
        (MODELS + "\ntokenizer: {pad_to_multiple: 8}",
         "tokenizer: unknown key 'pad_to_multiple'. Did you mean 'pad_to_multiple_of'?"),
        ("slices: [{sources: [{model: ./a, layer_range: [0, 1]}], lambda: 0.3}]",
         "'lambda' of slice 0 has no effect there; write it under `parameters:`."),
        ("slices: [{sources: [{model: ./a, layer_range: [0, 1]}], paramaters: {floor: 1}}]",
         "slice 0: unknown key 'paramaters'. Did you mean 'parameters'?"),
        ("slices: [{sources: [{model: ./a, layer_range: [0, 1]}], residual_weight: 0.5}]",
         "'residual_weight' of slice 0 has no effect there; mergekit does not look at it."),
        ("slices: [{sources: [{model: ./a, layer_range: [0, 1], weight: 2}]}]",
         "'weight' of ./a in slice 0 has no effect there; write it under `parameters:`."),
        ("modules: {text: {models: [{model: ./a, weight: 2}]}}",
         "'weight' of ./a in text has no effect there; write it under `parameters:`."),
        ("modules: {text: {models: [{model: ./a}], floor: 1}}",
         "'floor' of module text has no effect there; write it under `parameters:`."),
        ("modules: {text: {models: [{model: ./a}], base_model: ./a}}",
         "'base_model' of module text has no effect there; mergekit does not look at it."),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_a_problem(text, problem):
    assert told(text) == [problem]


@pytest.mark.parametrize(
    "text",
    [
        MODELS + "\nnotes: mine\nx-lambdas: &l {lambda: 1}",
        MODELS + "\ncalibration: {path: x}",
        "models: [{model: ./a, calibration: {path: x}, parameters: {lambda: [0, 1]}}]",
        "models: [{model: {model: {path: ./a, revision: v1}}}]",
        "slices: [{sources: [{model: ./a, layer_range: [0, 1]}], base_model: ./b}]",
        MODELS + "\ntokenizer: {source: union, tokens: {<x>: {source: {kind: zero}}}}",
    ],
)
def test_what_is_known_and_notes_are_none(text, caplog):
    assert not told(text)
    assert not caplog.records


def test_below_the_first_level_a_key_that_nobody_knows_gets_a_warning(caplog):
    assert not told("models: [{model: ./a, comment: good}, {model: ./b, scale: 0.5}]")
    assert caplog.messages == [
        "mergekit does not know and ignores 'comment' of ./a, 'scale' of ./b."
    ]


def test_several_recipes_in_one_file(pair, tmp_path, monkeypatch):
    """All of ours are looked at before the first of them is merged; a stage's `name` is known."""
    monkeypatch.setattr(LoaderCache, "loaders", {})
    (a, b), _, _ = pair
    recipes = [{"name": "one", **recipe_of(a, b)}, {"name": "two", **recipe_of(a, b)}]
    recipes[1]["models"][0]["lambda"] = 0.7
    path = tmp_path / "recipes.yml"

    def run():
        path.write_text(yaml.safe_dump_all(recipes))
        return CliRunner().invoke(multimerge.main, [str(path), "-I", str(tmp_path / "i")])

    result = run()
    assert result.exit_code != 0
    assert f"stage two: 'lambda' of {a} has no effect there" in result.output
    assert not (tmp_path / "i" / "one").exists()
    recipes[1]["models"][0]["parameters"] = {"lambda": recipes[1]["models"][0].pop("lambda")}
    result = run()
    assert result.exit_code == 0, result.output
    assert (tmp_path / "i" / "two").exists()


@pytest.mark.skipif(not INSTALLED, reason="the package is not installed")
def test_mergekit_s_module_is_its_command(pair, tmp_path):
    (a, b), _, _ = pair
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump({**recipe_of(a, b), "excludes": ["classifier"]}))
    start = [sys.executable, "-m", "mergekit.scripts.run_yaml"]
    process = subprocess.run([*start, path, tmp_path / "out"], capture_output=True, text=True)
    assert process.returncode != 0
    assert "unknown key 'excludes'. Did you mean 'exclude'?" in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="a shell's pipe")
def test_a_recipe_from_a_pipe_is_merged(pair, tmp_path):
    """It can be read once only, and mergekit has done that."""
    (a, b), thetas, fishers = pair
    content = yaml.safe_dump(recipe_of(a, b, lambdas=[1, 3]))
    process = command("mergekit-yaml", "/dev/stdin", tmp_path / "out", "--quiet", given=content)
    assert process.returncode == 0, process.stderr
    expected = merge_oracle.merge(thetas, fishers, [1, 3], list(thetas[0]))
    assert_close(read(tmp_path / "out"), expected)
