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

from fisher_mergekit.errors import RecipeError
from fisher_mergekit.recipe import parse_config, read_recipe
from fisher_mergekit.recipe.dropped import dropped_keys
from fisher_mergekit.recipe.written import read_text

INSTALLED = (Path(sysconfig.get_path("purelib")) / "fisher_mergekit.pth").exists()


@pytest.fixture
def pair(tmp_path):
    """Return two measured models: folders, weights, Fishers."""
    return list(
        zip(*(make_measured(tmp_path / n, seed=i) for i, n in enumerate("ab")), strict=True)
    )


def told(text: str) -> list[str]:
    (written,) = read_text(f"merge_method: fisher\n{text}")
    return dropped_keys(parse_config(written.content, where="here"), written)


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
         "lambda of ./a: unknown key 'filters'. Did you mean 'filter'? Known here: filter, value."),
        ("models: [{model: ./a, parameters: {lambda: {tensor: mlp, value: 0}}}]",
         "lambda of ./a: unknown key 'tensor'. Known here: filter, value."),
        (MODELS + "\nexcludes: [classifier]",
         "the recipe: unknown key 'excludes'. Did you mean 'exclude'? Write that under "
         "`parameters:`. A key of your own may begin with `x-`."),
        (MODELS + "\nBASE-MODEL: ./a",
         "the recipe: unknown key 'BASE-MODEL'. Did you mean 'base_model'? A key of your own may "
         "begin with `x-`."),
        (MODELS + "\nsidecar: ./x",
         "'sidecar' of the recipe has no effect there; write it under a model's own "
         "`parameters:`."),
        ("models: [{model: ./a, exclude: [x]}]",
         "'exclude' of ./a has no effect there; write it under the recipe's own `parameters:`."),
        (MODELS + "\ntokenizer: {tokens: {<x>: {source: ./a, forced: true}}}",
         "token '<x>': unknown key 'forced'. Did you mean 'force'? Known here: force, source."),
        (MODELS + "\ntokenizer: {tokens: {x: {source: {kind: zero, model: ./a}}}}",
         "source of token 'x': unknown key 'kind'. Known here: lora, model, "
         "override_architecture."),
        (MODELS + "\ntokenizer: {pad_to_multiple: 8}",
         "tokenizer: unknown key 'pad_to_multiple'. Did you mean 'pad_to_multiple_of'? Known here: "
         "pad_to_multiple_of, source, tokens."),
        ("models: [{model: {model: ./a, lroa: ./b}}]",
         "model of ./a: unknown key 'lroa'. Did you mean 'lora'? Known here: lora, model, "
         "override_architecture."),
        ("models: [{model: {model: {path: ./a, commit: v1}}}]",
         "model of model of ./a: unknown key 'commit'. Known here: path, revision."),
        (MODELS + "\nbase_model: {model: ./a, adapter: ./b}",
         "base_model of the recipe: unknown key 'adapter'. Known here: lora, model, "
         "override_architecture."),
        (MODELS + "\nparameters: {floor: 1}\nparameters: {exclude: [x]}",
         "line 4: 'parameters' stands in one block twice, and only the last one counts. Keep one."),
        ("models: [{model: ./a, parameters: {lambda: 1, lambda: 2}}]",
         "line 2: 'lambda' stands in one block twice, and only the last one counts. Keep one."),
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
        MODELS + "\nname: mine\nx-lambdas: {lambda: 1, lambda: 2}",
        MODELS + "\ncalibration: {path: x}",
        "models: [{model: ./a, calibration: {path: x}, parameters: {lambda: [0, 1]}}]",
        "models: [{model: {model: {path: ./a, revision: v1}}}]",
        "slices: [{sources: [{model: ./a, layer_range: [0, 1]}], base_model: ./b}]",
        "slices: [{sources: [{model: ./a, layer_range: [0, 1]}], residual_weight: null}]",
        "lambda: &l 0.5\nparams: &p {lambda: *l}\nmodels: [{model: ./a, parameters: *p}]",
        "template: &t {parameters: {lambda: 0.5}}\nmodel_a: &a ./a\nmodels: [{<<: *t, model: *a}]",
        "model_a: &m {model: ./a}\nslice_1: &s [*m]\nmodels: *s",
        "calibration_rte: {data: &c {path: x}}\nmodels: [{model: ./a, calibration: *c}]",
        MODELS + "\nparameters:\ntokenizer: {tokens: }",
        MODELS + "\nbase_model: {model: {path: ./a}, lora: ./b}",
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


def test_notes_are_no_misspellings(caplog):
    notes = ["license: x", "old_models: [./c]", "num_parameters: 7B", "template: x", "note: 1"]
    assert not told("\n".join([MODELS, *notes, "tokenizer_note: x", "note: 2"]))
    (message,) = caplog.messages
    assert "'license' of the recipe, 'old_models' of the recipe" in message


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("models: [{model: &m ./a}, {model: ./b}]\nbase_modle: *m", "base_modle"),
        (MODELS + "\nparamters: {exclude: [x], floor: &f 0.5, ridge: *f}", "paramters"),
        (MODELS + "\nparameterz: &p {floor: *p}", "parameterz"),
        (MODELS + "\ntokenizer_sources: union", "tokenizer_sources"),
        (MODELS + "\noutput_dtype: bfloat16", "output_dtype"),
    ],
)
def test_a_misspelt_key_is_no_anchor_for_using_one(text, key):
    (problem,) = told(text)
    assert f"unknown key {key!r}. Did you mean" in problem


def test_a_misspelt_key_that_is_an_anchor_gets_a_warning(caplog):
    assert not told("base_modle: &b ./a\nmodels: [{model: *b}]")
    assert caplog.messages == ["mergekit does not know and ignores 'base_modle' of the recipe."]


def test_the_depth_of_notes(tmp_path):
    path = tmp_path / "recipe.yml"
    path.write_text(f"merge_method: fisher\n{MODELS}\nx-deep: {'[' * 340}{']' * 340}")
    assert [str(m.reference) for m in read_recipe(path).models] == ["./a", "./b"]
    path.write_text(f"merge_method: fisher\n{MODELS}\nx-deep: {'[' * 3000}{']' * 3000}")
    with pytest.raises(RecipeError, match="is not readable YAML"):
        read_recipe(path)


def test_several_recipes_in_one_file(pair, tmp_path, monkeypatch):
    """All of ours are looked at before the first of ours is merged; a stage's `name` is known."""
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


def test_a_file_that_changes_while_it_is_worked_on(pair, tmp_path, monkeypatch, caplog):
    """What is merged is what mergekit has read; and what is told is told once."""
    monkeypatch.setattr(LoaderCache, "loaders", {})
    (a, b), _, _ = pair
    recipes = [{"name": "one", **recipe_of(a, b)}, {"name": "two", **recipe_of(a, b)}]
    recipes[0]["models"][0]["comment"] = "good"
    path = tmp_path / "recipes.yml"
    path.write_text(yaml.safe_dump_all(recipes))
    real = multimerge.run_merge

    def then_change(*arguments, **options):
        real(*arguments, **options)
        path.write_text("merge_method: fisher\nmodels: [")

    monkeypatch.setattr(multimerge, "run_merge", then_change)
    result = CliRunner().invoke(multimerge.main, [str(path), "-I", str(tmp_path / "i")])
    assert result.exit_code == 0, result.output
    assert caplog.text.count("'comment'") == 1


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a shell's pipe")
def test_a_recipe_from_a_pipe_is_merged(pair, tmp_path):
    """It can be read once only, and mergekit has done that."""
    (a, b), thetas, fishers = pair
    content = yaml.safe_dump(recipe_of(a, b, lambdas=[1, 3]))
    process = command("mergekit-yaml", "/dev/stdin", tmp_path / "out", "--quiet", given=content)
    assert process.returncode == 0, process.stderr
    expected = merge_oracle.merge(thetas, fishers, [1, 3], list(thetas[0]))
    assert_close(read(tmp_path / "out"), expected)
