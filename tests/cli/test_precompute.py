"""`mergekit-fisher precompute` on tiny checkpoints: what it writes, and every way to go wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import oracles
import pytest
import tiny
import torch
import yaml
from click.testing import CliRunner, Result
from models import read, rewrite
from oracles import assert_same_fishers
from tiny import ROWS, write_rows

from fisher_mergekit.cli import main
from fisher_mergekit.sidecar.reader import Sidecar


def run(*arguments: object) -> Result:
    """Run `mergekit-fisher precompute` in this process."""
    return CliRunner().invoke(main, ["precompute", *map(str, arguments)])


def succeed(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def refuse(*arguments: object) -> str:
    """Run it, expect one message without a traceback; return it on one line."""
    result = run(*arguments)
    assert result.exit_code != 0
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Error: " in result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="session")
def originals(tmp_path_factory) -> dict[str, Path]:
    """Tiny models that are copied, never written to."""
    folder = tmp_path_factory.mktemp("originals")
    return {
        "bert": tiny.save_model(folder / "bert", num_labels=3),
        "other": tiny.save_model(folder / "other", num_labels=3, seed=1),
        "gpt2": tiny.save_model(folder / "gpt2", "gpt2", chat=tiny.CHAT_TEMPLATE),
    }


@pytest.fixture(scope="session")
def measured(originals, tmp_path_factory):
    """A recipe's data, and the sidecars of its two models, made once and copied."""
    folder = tmp_path_factory.mktemp("measured")
    data = write_rows(folder / "data.jsonl")
    for name in ("bert", "other"):
        label = ("--label", "label")
        succeed(*flags(originals[name], data, *label, "--out", folder / name))
    return folder


@pytest.fixture
def bert(originals, tmp_path) -> Path:
    return Path(shutil.copytree(originals["bert"], tmp_path / "bert"))


@pytest.fixture
def gpt2(originals, tmp_path) -> Path:
    return Path(shutil.copytree(originals["gpt2"], tmp_path / "gpt2"))


@pytest.fixture
def data(tmp_path) -> Path:
    return write_rows(tmp_path / "data.jsonl")


def flags(model: Path, data: Path, *more: object) -> list[object]:
    return ["--model", model, "--path", data, "--text", "text", *more]


def write_recipe(folder: Path, *models: Path, calibration: dict | None, **top: object) -> Path:
    path = folder / "recipe.yml"
    content = {
        "merge_method": "fisher",
        "models": [{"model": str(model)} for model in models],
        "calibration": calibration,
        "dtype": "float32",
        **top,
    }
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
    return path


def fisher_of(model: Path, out: Path | None = None) -> dict[str, torch.Tensor]:
    sidecar = Sidecar(out or model / "sidecar", "fisher")
    return {name: sidecar.load(name).clone() for name in sidecar}  # off the file: tests damage it


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return every file's content and time."""
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.iterdir())}


class TestARecipe:
    @pytest.fixture
    def recipe(self, originals, measured, bert, tmp_path):
        """Not measured yet."""
        other = Path(shutil.copytree(originals["other"], tmp_path / "other"))
        data = str(measured / "data.jsonl")
        calibration = {"path": data, "text": "text", "label": "label"}
        return write_recipe(tmp_path, bert, other, calibration=calibration), bert, other

    @pytest.fixture
    def done(self, recipe, measured):
        """Measured."""
        _, bert, other = recipe
        shutil.copytree(measured / "bert", bert / "sidecar")
        shutil.copytree(measured / "other", other / "sidecar")
        return recipe

    def test_every_model_is_measured_and_the_result_is_the_exact_fisher(self, recipe):
        path, *models = recipe
        said = succeed(path)
        assert "Measured 2 of 2 models" in said
        assert f"Next: mergekit-yaml {path} merged/" in said
        for folder in models:
            assert f"{folder}: read 7 examples" in said
            assert f"wrote {folder / 'sidecar'}" in said
            model = tiny.transformers.BertForSequenceClassification.from_pretrained(folder)
            tokenizer = tiny.transformers.AutoTokenizer.from_pretrained(folder)
            examples = [
                tiny.Example(i, {k: encoded[k] for k in ("input_ids", "token_type_ids")})
                for i, encoded in enumerate(tokenizer(row["text"]) for row in ROWS)
            ]
            assert_same_fishers(fisher_of(folder), oracles.exact_classifier(model, examples))

    def test_a_second_run_measures_nothing_and_touches_nothing(self, done):
        path, *models = done
        before = [snapshot(folder / "sidecar") for folder in models]
        said = succeed(path)
        assert said.count("is valid, nothing to measure") == 2
        assert "Measured 0 of 2 models" in said
        assert [snapshot(folder / "sidecar") for folder in models] == before

    def test_only_what_is_missing_is_measured(self, recipe):
        path, first, second = recipe
        succeed(path, "--model", first)
        assert not (second / "sidecar").exists()
        before = snapshot(first / "sidecar")
        assert "Measured 1 of 2 models" in succeed(path)
        assert snapshot(first / "sidecar") == before

    def test_force_measures_again_to_the_same_bytes(self, recipe):
        path, first, _ = recipe
        succeed(path)
        before = snapshot(first / "sidecar")
        assert "Measured 2 of 2 models" in succeed(path, "--force")
        after = snapshot(first / "sidecar")
        assert after.keys() == before.keys()
        assert after["fisher.safetensors"][1] > before["fisher.safetensors"][1]
        assert after["fisher.safetensors"][0] == before["fisher.safetensors"][0]
        assert after["README.md"][0] == before["README.md"][0]
        headers = [json.loads(files["header.json"][0]) for files in (before, after)]
        for header in headers:
            assert header["kinds"]["fisher"].pop("wall_seconds") > 0
        assert headers[0] == headers[1]

    def test_a_sidecar_of_other_weights_is_measured_anew(self, done):
        path, first, _ = done
        before = fisher_of(first)
        weights = read(first)
        weights["classifier.bias"] = weights["classifier.bias"] + 1
        rewrite(first, weights)
        assert "Measured 1 of 2 models" in succeed(path)
        assert not torch.equal(fisher_of(first)["classifier.bias"], before["classifier.bias"])

    @pytest.mark.parametrize(
        "damage",
        [
            lambda folder: (folder / "header.json").unlink(),
            lambda folder: (folder / "header.json").write_text("{"),
            lambda folder: (folder / "fisher.safetensors").unlink(),
            lambda folder: os.truncate(folder / "fisher.safetensors", 500),
            lambda folder: os.truncate(folder / "fisher.safetensors", 0),
        ],
        ids=["no header", "half a header", "no tensors", "truncated", "empty"],
    )
    def test_a_damaged_sidecar_is_measured_anew(self, done, damage):
        path, first, _ = done
        good = fisher_of(first)
        damage(first / "sidecar")
        assert "Measured 1 of 2 models" in succeed(path)
        assert_same_fishers(fisher_of(first), good, relative=0, noise=0)

    @pytest.mark.parametrize(
        ("change", "phrase"),
        [
            (["--estimator", "empirical"], "estimator was 'exact', now 'empirical'"),
            (["--examples", "3"], "examples was 4096, now 3"),
            (["--max-length", "5"], "max_length was 512, now 5"),
            (["--text", "pair"], "text was 'text', now 'pair'"),
            (["--random-seed", "9"], "seed was 0, now 9"),
            (["--shuffle"], "shuffle was False, now True"),
            (["--sidecar-dtype", "bfloat16"], "sidecar_dtype was 'float32', now 'bfloat16'"),
        ],
    )
    def test_other_settings_are_refused_with_both_remedies(self, done, change, phrase):
        path, *_ = done
        said = refuse(path, *change)
        assert said.count(phrase) == 2, said
        assert "2 problems" in said
        assert said.count("Measure it again with --force, or ask for what is there.") == 2

    @pytest.mark.parametrize("change", [["--batch-size", "3"], ["--quiet"], ["-j", "1"]])
    def test_what_changes_no_number_is_no_other_setting(self, done, change):
        path, *_ = done
        succeed(path, *change)

    def test_every_problem_of_every_model_is_told_before_the_first_is_measured(
        self, recipe, tmp_path
    ):
        path, first, second = recipe
        content = yaml.safe_load(path.read_text())
        content["models"] += [{"model": str(tmp_path / "nowhere")}]
        content["models"][1]["calibration"] = {"label": "lable"}
        path.write_text(yaml.safe_dump(content))
        said = refuse(path)
        assert "2 problems" in said
        assert f"{second}: " in said
        assert "no column 'lable'. Did you mean 'label'?" in said
        assert f"{tmp_path / 'nowhere'}" in said
        assert not (first / "sidecar").exists()


class TestOneModel:
    def test_without_a_recipe_the_sidecar_lies_beside_the_weights(self, bert, data):
        said = succeed(*flags(bert, data))
        assert f"Next: mergekit-fisher inspect {bert / 'sidecar'}" in said
        assert set(fisher_of(bert)) == set(read(bert))

    def test_out_is_the_folder_that_is_written(self, bert, data, tmp_path):
        succeed(*flags(bert, data, "--out", tmp_path / "deep" / "down"))
        assert fisher_of(bert, tmp_path / "deep" / "down")
        assert not (bert / "sidecar").exists()

    def test_quiet_says_nothing(self, bert, data):
        assert succeed(*flags(bert, data, "--quiet")) == ""

    def test_flags_override_the_recipe(self, bert, data, tmp_path):
        calibration = {"path": "nowhere.jsonl", "text": "nothing", "examples": 2}
        recipe = write_recipe(tmp_path, bert, calibration=calibration)
        succeed(recipe, "--path", data, "--text", "text", "--text", "pair", "--examples", 4)
        measurement = Sidecar(bert / "sidecar", "fisher").measurement
        assert measurement.settings.examples == 4
        assert measurement.calibration["text"] == ["text", "pair"]
        assert measurement.calibration["path"] == str(data)

    @pytest.mark.parametrize("estimator", ["exact", "sampled", "empirical"])
    def test_batch_size_and_order_of_the_data_change_nothing(self, bert, data, tmp_path, estimator):
        options = ("--label", "label", "--estimator", estimator)
        succeed(*flags(bert, data, *options, "--out", tmp_path / "a"))
        succeed(*flags(bert, data, *options, "--out", tmp_path / "b", "--batch-size", 2))
        assert_same_fishers(fisher_of(bert, tmp_path / "b"), fisher_of(bert, tmp_path / "a"))
        if estimator == "sampled":
            return  # a draw belongs to an example's place in the data
        back = write_rows(tmp_path / "back.jsonl", ROWS[::-1])
        succeed(*flags(bert, back, *options, "--out", tmp_path / "c"))
        assert_same_fishers(fisher_of(bert, tmp_path / "c"), fisher_of(bert, tmp_path / "a"))

    def test_the_data_twice_over_changes_nothing(self, bert, data, tmp_path):
        twice = write_rows(tmp_path / "twice.jsonl", [*ROWS, *ROWS])
        succeed(*flags(bert, data, "--out", tmp_path / "a"))
        succeed(*flags(bert, twice, "--out", tmp_path / "b"))
        assert_same_fishers(fisher_of(bert, tmp_path / "b"), fisher_of(bert, tmp_path / "a"))

    def test_another_seed_draws_another_estimate(self, gpt2, data, tmp_path):
        for seed in (0, 1):
            succeed(*flags(gpt2, data, "--random-seed", seed, "--out", tmp_path / str(seed)))
        first, second = (fisher_of(gpt2, tmp_path / str(seed)) for seed in (0, 1))
        assert not torch.equal(first["transformer.wte.weight"], second["transformer.wte.weight"])

    def test_a_causal_lm_is_sampled_by_default_and_needs_no_labels(self, gpt2, data):
        succeed(*flags(gpt2, data))
        settings = Sidecar(gpt2 / "sidecar", "fisher").measurement.settings
        assert (settings.estimator, settings.likelihood) == ("sampled", "causal_lm")

    def test_a_causal_lm_can_be_measured_on_chats(self, gpt2, tmp_path):
        chat = [{"role": "user", "content": "the cat"}, {"role": "model", "content": "sat"}]
        chats = write_rows(tmp_path / "chats.jsonl", [{"messages": chat}] * 3)
        succeed(
            "--model", gpt2, "--path", chats, "--messages", "messages", "--mask-prompt"
        )  # fmt: skip
        settings = Sidecar(gpt2 / "sidecar", "fisher").measurement.settings
        assert settings.mask_prompt
        assert settings.tokens == 3 * 5

    def test_fewer_examples_than_asked_is_said_and_recorded(self, bert, data, caplog):
        succeed(*flags(bert, data, "--examples", 50))
        assert "has only 7 examples, not the 50 asked for" in caplog.text
        settings = Sidecar(bert / "sidecar", "fisher").measurement.settings
        assert (settings.examples, settings.examples_requested) == (7, 50)
        assert "7 (asked for 50)" in (bert / "sidecar" / "README.md").read_text()

    def test_large_sidecars_are_sharded(self, bert, data, tmp_path):
        succeed(*flags(bert, data, "--out", tmp_path / "whole"))
        succeed(*flags(bert, data, "--out", tmp_path / "parts", "--out-shard-size", 2000))
        shards = sorted((tmp_path / "parts").glob("fisher-*-of-*.safetensors"))
        assert len(shards) > 2
        assert (tmp_path / "parts" / "fisher.safetensors.index.json").exists()
        assert_same_fishers(
            fisher_of(bert, tmp_path / "parts"), fisher_of(bert, tmp_path / "whole"), relative=0
        )
        succeed(*flags(bert, data, "--out", tmp_path / "parts", "--force"))
        assert not list((tmp_path / "parts").glob("fisher-*"))
        assert not (tmp_path / "parts" / "fisher.safetensors.index.json").exists()

    def test_bfloat16_on_request(self, bert, data):
        succeed(*flags(bert, data, "--sidecar-dtype", "bfloat16"))
        assert {value.dtype for value in fisher_of(bert).values()} == {torch.bfloat16}


class TestBadInput:
    """Each is one message with what mends it, and leaves no sidecar."""

    @pytest.fixture(autouse=True)
    def _nothing_is_written(self, tmp_path):
        yield
        assert not list(tmp_path.rglob("header.json"))
        assert not list(tmp_path.rglob("*.partial"))

    @pytest.mark.parametrize(
        ("rows", "options", "phrase"),
        [
            ([], [], "data.jsonl"),
            (ROWS, ["--text", "pear"], "no column 'pear'. Did you mean 'pair'? Columns: text"),
            (ROWS, ["--label", "label_"], "no column 'label_'. Did you mean 'label'?"),
            ([*ROWS, {"text": " ", "label": 0}], [], "example 7: column 'text' holds no text"),
            ([*ROWS, {"text": None, "label": 0}], [], "example 7: column 'text' holds no text"),
            ([{"text": 5}], [], "example 0: column 'text' holds no text, but 5"),
            (
                [*ROWS, {"text": "no", "label": 3}],
                ["--label", "label"],
                "example 7: label 3 is none of the model's 3 classes (0 to 2: LABEL_0, LABEL_1",
            ),
            ([{"text": "no", "label": "yes"}], ["--label", "label"], "label 'yes' is none of"),
            (
                ROWS,
                ["--estimator", "empirical"],
                "example 0 has none. Name the column: `label: COLUMN` (--label)",
            ),
            (
                [*ROWS, {"text": "no", "label": None}],
                ["--label", "label", "--estimator", "empirical"],
                "needs labels, and example 7 has none",
            ),
            (ROWS, ["--examples", "0"], "examples: Input should be greater than 0"),
            (ROWS, ["--batch-size", "0"], "batch_size: Input should be greater than 0"),
            (ROWS, ["--split", "test"], "split 'test'"),
            (ROWS, ["--messages", "text"], "text:"),
            (ROWS, ["--mask-prompt"], "mask_prompt needs to know the prompt"),
        ],
    )  # fmt: skip
    def test_calibration(self, bert, tmp_path, rows, options, phrase):
        data = write_rows(tmp_path / "data.jsonl", rows)
        named = [] if "--text" in options else ["--text", "text"]
        said = refuse("--model", bert, "--path", data, *named, *options)
        assert phrase in said

    def test_no_data(self, bert):
        assert "no calibration data. Add `calibration:" in refuse("--model", bert)

    def test_data_that_does_not_exist(self, bert):
        said = refuse(*flags(bert, "nowhere.jsonl"))
        assert "calibration data nowhere.jsonl does not exist" in said

    def test_data_without_a_named_column(self, bert, data):
        assert "name either the text column(s)" in refuse("--model", bert, "--path", data)

    def test_data_that_is_not_what_its_name_says(self, bert, tmp_path):
        (tmp_path / "data.jsonl").write_bytes(b"\x80\x02}q\x00.")
        assert "cannot load calibration data" in refuse(*flags(bert, tmp_path / "data.jsonl"))

    def test_nothing_at_all(self):
        assert "give a recipe, or one model: --model" in refuse()

    @pytest.mark.parametrize(
        ("text", "phrase"),
        [
            (None, "cannot read the recipe"),
            ("merge_method: [", "is not readable YAML"),
            ("- a\n- b", "is not a recipe: expected a mapping"),
            ("merge_method: fisher\nmodels: 5", "is not a mergekit recipe"),
            ("merge_method: linear\nmodels: [{model: ./a}]\ndtype: float32",
             "merge_method 'linear' needs nothing measured. Methods that do: fisher"),
            ("merge_method: fisher\nmodels: [{model: ./a}]\ncalibration: {exampels: 5}",
             "unknown key 'exampels'. Did you mean 'examples'?"),
            ("merge_method: fisher\nmodels: [{model: ./a}]\ncalibration: {examples: many}",
             "examples: Input should be a valid integer"),
            ("merge_method: fisher\nmodels: [{model: ./a}]\ncalibration: {estimator: exakt}",
             "estimator: Input should be 'exact', 'sampled' or 'empirical'"),
            ("merge_method: fisher\nmodels: [{model: ./a}]\ncalibration: 7",
             "expected a mapping of keys, got 7"),
            ("merge_method: fisher\nmodels: [{model: ./a, parameters: {lamda: 1}}]",
             "unknown parameter 'lamda'. Did you mean 'lambda'?"),
        ],
    )  # fmt: skip
    def test_recipe(self, tmp_path, text, phrase):
        path = tmp_path / "recipe.yml"
        if text is not None:
            path.write_text(text)
        assert phrase in refuse(path)

    def test_a_model_that_the_recipe_does_not_have(self, bert, tmp_path):
        recipe = write_recipe(tmp_path, bert, calibration={"path": "x", "text": "text"})
        assert "has no model './b'; it has" in refuse(recipe, "--model", "./b")

    def test_a_missing_model_folder(self, data, tmp_path):
        said = refuse(*flags(tmp_path / "gone", data))
        assert f"{tmp_path / 'gone'} is neither a local folder nor" in said

    def test_an_empty_model_folder(self, data, tmp_path):
        (tmp_path / "empty").mkdir()
        said = refuse(*flags(tmp_path / "empty", data))
        assert "has no model.safetensors and no model.safetensors.index.json" in said

    def test_pickled_weights(self, bert, data):
        torch.save(read(bert), bert / "pytorch_model.bin")
        (bert / "model.safetensors").unlink()
        said = refuse(*flags(bert, data))
        assert "holds only pickled weights (pytorch_model.bin)" in said
        assert "save_pretrained it" in said

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_that_are_not_finite(self, bert, data, value):
        weights = read(bert)
        weights["bert.embeddings.word_embeddings.weight"][23, 0] = value
        rewrite(bert, weights)
        said = refuse(*flags(bert, data))
        assert "bert.embeddings.word_embeddings.weight in" in said
        assert "holds NaN or infinity" in said

    def test_a_head_that_is_missing_from_the_checkpoint(self, bert, data):
        weights = {k: v for k, v in read(bert).items() if not k.startswith("classifier")}
        rewrite(bert, weights)
        said = refuse(*flags(bert, data))
        assert "no tensors for 2 parameters of BertForSequenceClassification" in said
        assert "(classifier.weight, classifier.bias)" in said
        assert "Only a whole model can be measured" in said

    @pytest.mark.parametrize(
        ("file", "content", "phrase"),
        [
            ("config.json", "{", "is not a model that transformers can read"),
            ("config.json", "{}", "is not a model that transformers can read"),
            ("config.json", "[]", "is not a model that transformers can read"),
            ("config.json", '{"model_type": "bert"}', "names no architecture"),
            ("config.json", '{"model_type": "x"}', "is not a model that transformers can read"),
            ("tokenizer.json", "{", "has no tokenizer that transformers can read"),
            ("model.safetensors", "", "is empty (0 bytes)"),
            ("model.safetensors", "x" * 300, "is not a safetensors file, or is cut short"),
        ],
    )  # fmt: skip
    def test_damaged_model_files(self, bert, data, file, content, phrase):
        (bert / file).write_text(content)
        assert phrase in refuse(*flags(bert, data))

    def test_truncated_weights(self, bert, data):
        os.truncate(bert / "model.safetensors", 5000)
        assert "is truncated" in refuse(*flags(bert, data))

    @pytest.mark.parametrize(
        ("change", "phrase"),
        [
            ({"architectures": ["BertForMaskedLM"]}, "no likelihood is known for BertForMaskedLM"),
            ({"id2label": {"0": "only"}, "label2id": {"only": 0}}, "classifier has 1 label(s)"),
            ({"problem_type": "regression"}, "problem_type 'regression'"),
            ({"hidden_size": -8}, "describes no BertForSequenceClassification"),
            ({"num_attention_heads": 3}, "describes no BertForSequenceClassification"),
            ({"hidden_size": "wide"}, "is not a model that transformers can read"),
        ],
    )  # fmt: skip
    def test_configurations_that_cannot_be_measured(self, bert, data, change, phrase):
        config = json.loads((bert / "config.json").read_text())
        (bert / "config.json").write_text(json.dumps({**config, **change}))
        assert phrase in refuse(*flags(bert, data))

    def test_exact_on_a_causal_lm(self, gpt2, data):
        said = refuse(*flags(gpt2, data, "--estimator", "exact"))
        assert "one backward pass for each of the 24 tokens of the vocabulary" in said
        assert "Use `estimator: sampled`" in said

    def test_a_causal_lm_with_nothing_to_score(self, gpt2, tmp_path):
        data = write_rows(tmp_path / "data.jsonl", [{"text": "cat"}, {"text": "dog"}])
        said = refuse(*flags(gpt2, data))
        assert "the Fisher is zero everywhere: nothing in the calibration data is scored" in said

    def test_chats_without_a_template(self, bert, tmp_path):
        chats = write_rows(
            tmp_path / "chats.jsonl", [{"messages": [{"role": "user", "content": "a"}]}]
        )
        said = refuse("--model", bert, "--path", chats, "--messages", "messages")
        assert "has no chat template; name a plain text column" in said

    @pytest.mark.parametrize("device", ["cuda:77", "nonsense", "meta"])
    def test_a_device_that_is_not_there(self, bert, data, device):
        said = refuse(*flags(bert, data, "--device", device))
        assert f"device '{device}' cannot be used here" in said
        assert "Try --device cpu." in said

    def test_a_folder_that_cannot_be_written(self, bert, data, tmp_path):
        (tmp_path / "file").write_text("")
        said = refuse(*flags(bert, data, "--out", tmp_path / "file" / "sidecar"))
        assert "cannot write the sidecar" in said


@pytest.mark.slow
def test_the_installed_command_measures_and_fails_as_a_process_of_its_own(bert, data):
    """The point is the command: no traceback, an exit code, and messages on the right streams."""

    def command(*arguments):
        arguments = map(str, arguments)
        return subprocess.run(
            [sys.executable, "-c", "from fisher_mergekit.cli import main; main()", *arguments],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )

    done = command("precompute", *flags(bert, data))
    assert done.returncode == 0, done.stderr
    assert "Measured 1 of 1 models" in done.stdout
    assert "Measuring" in done.stderr  # the progress bar
    assert "Warning" not in done.stderr
    failed = command("precompute", *flags(bert, data, "--examples", "3"))
    assert failed.returncode == 1
    assert failed.stderr.startswith("Error: ")
    assert "Traceback" not in failed.stderr
