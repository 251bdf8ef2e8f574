"""`mergekit-fisher precompute` on tiny checkpoints: what it measures, writes and leaves alone."""

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
from models import read, rewrite
from oracles import assert_same_fishers
from precomputing import fisher_of, flags, refuse, snapshot, succeed, write_recipe
from tiny import ROWS, write_rows

from fisher_mergekit.sidecar.reader import Sidecar


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
                tiny.labelled(i, **{k: encoded[k] for k in ("input_ids", "token_type_ids")})
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

    def test_without_data_of_its_own_a_model_is_taken_as_it_was_measured(self, bert, data):
        succeed(*flags(bert, data, "--max-length", "5", "--examples", "3"))
        assert "Measured 0 of 1 models" in succeed("--model", bert)
        assert "max_length was 5, now 6" in refuse("--model", bert, "--max-length", "6")

    def test_examples_drawn_from_a_stream_are_others(self, bert, data, tmp_path):
        """In order they are the same."""
        calibration = {"path": str(data), "text": "text"}
        for drawn in (False, True):
            path = write_recipe(tmp_path, bert, calibration={**calibration, "shuffle": drawn})
            succeed(path, "--force")
            streamed = {**calibration, "shuffle": drawn, "streaming": True}
            write_recipe(tmp_path, bert, calibration=streamed)
            if drawn:
                assert "streaming was None, now True" in refuse(path)
                succeed(path, "--force")
            assert "Measured 0 of 1 models" in succeed(path)

    def test_one_file_spelt_in_two_ways_is_one_file(self, bert, data, monkeypatch):
        monkeypatch.chdir(data.parent)
        succeed(*flags(bert, data.name))
        assert "Measured 0 of 1 models" in succeed(*flags(bert, f"./{data.name}"))

    def test_one_model_spelt_in_two_ways_is_measured_once(self, bert, data, tmp_path):
        calibration = {"path": str(data), "text": "text"}
        pieces = [
            {"model": f"{bert}{end}", "layer_range": [i, i + 1]} for i, end in enumerate(["", "/"])
        ]
        content = {
            "merge_method": "fisher",
            "slices": [{"sources": [{**pieces[0], "calibration": calibration}, pieces[1]]}],
        }
        path = tmp_path / "recipe.yml"
        path.write_text(yaml.safe_dump(content))
        assert "Measured 1 of 1 models" in succeed(path)
        assert "Measured 0 of 1 models" in succeed(path, "--model", bert)

    def test_data_that_changed_under_the_same_name_is_noticed(self, bert, data):
        succeed(*flags(bert, data))
        data.write_text(data.read_text().replace("cat", "dog"))
        assert "the content of path was" in refuse(*flags(bert, data))
        data.unlink()  # the measurement stands without the data
        assert "Measured 0 of 1 models" in succeed(*flags(bert, data))

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
        assert "7 (of at most 50)" in (bert / "sidecar" / "README.md").read_text()

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
