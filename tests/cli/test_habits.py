"""What people type by habit or mistake, and `precompute` must not take for something else."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch
import yaml
from click.testing import CliRunner
from models import make_model, read, rewrite
from precomputing import fisher_of, flags, refuse, snapshot, succeed
from tiny import CHAT_TEMPLATE, ROWS, save_model, write_rows

from fisher_mergekit.cli import main

pytestmark = pytest.mark.slow  # exhaustive: not needed at every change


@pytest.fixture
def data(tmp_path):
    return write_rows(tmp_path / "data.jsonl", ROWS[:3])


@pytest.fixture
def bert(tmp_path):
    return save_model(tmp_path / "bert", num_labels=3)


def recipe(folder: Path, *models: dict, **top: object) -> Path:
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump({"merge_method": "fisher", "models": list(models), **top}))
    return path


def test_a_tied_tensor_that_the_files_hold_twice_is_written_twice(tmp_path, data):
    model = save_model(tmp_path / "tied", "llama", tie_word_embeddings=True)
    embedding = read(model)["model.embed_tokens.weight"]
    rewrite(model, {**read(model), "lm_head.weight": embedding.clone()})
    succeed(*flags(model, data))
    fisher = fisher_of(model)
    assert torch.equal(fisher["lm_head.weight"], fisher["model.embed_tokens.weight"])


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "gpt2"])
def test_a_model_without_tokenizer_is_refused(tmp_path, data, family):
    """transformers makes up a tokenizer to which every word is unknown."""
    model = make_model(tmp_path / "model", family)
    assert "has no tokenizer" in refuse(*flags(model, data))


def test_a_tokenizer_of_another_model_is_refused(tmp_path, data):
    model = save_model(tmp_path / "model", num_labels=3, vocab_size=10)
    assert "but the model has only 10 (vocab_size)" in refuse(*flags(model, data))


@pytest.mark.parametrize(("columns", "too_short"), [(1, 2), (2, 3)])
def test_a_length_that_special_tokens_fill_is_refused(bert, data, columns, too_short):
    """One token less, and tokenizers do not truncate at all."""
    pair = ["--text", "pair"] if columns == 2 else []
    for length in (1, too_short):
        said = refuse(*flags(bert, data, *pair, "--max-length", length))
        assert f"max_length: {length} tokens an example leave no room" in said
    succeed(*flags(bert, data, *pair, "--max-length", too_short + 1))


class TestLabels:
    @pytest.mark.parametrize("labels", ["102", [1.0, 0.0, 2.0], ["LABEL_1", "LABEL_0", "LABEL_2"]])
    def test_indices_as_floats_and_as_text_are_indices(self, bert, tmp_path, labels):
        rows = [{**row, "label": label} for row, label in zip(ROWS[:3], labels, strict=True)]
        options = ["--label", "label", "--estimator", "empirical"]
        succeed(*flags(bert, write_rows(tmp_path / "a.jsonl", rows), *options))
        found = fisher_of(bert)
        succeed(*flags(bert, write_rows(tmp_path / "b.jsonl", ROWS[:3]), *options, "--force"))
        expected = fisher_of(bert)
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    def test_a_number_that_is_also_another_class_s_name_is_refused(self, bert, data):
        config = json.loads((bert / "config.json").read_text())
        config |= {"label2id": {"1": 0, "2": 1, "3": 2}, "id2label": {"0": "1", "1": "2", "2": "3"}}
        (bert / "config.json").write_text(json.dumps(config))
        assert "but also the index of another, '2'" in refuse(
            *flags(bert, data, "--label", "label")
        )

    def test_a_missing_one_in_a_named_column_is_said_so(self, bert, tmp_path):
        path = write_rows(tmp_path / "some.jsonl", [ROWS[0], {**ROWS[1], "label": None}])
        said = refuse(*flags(bert, path, "--label", "label", "--estimator", "empirical"))
        assert "example 1 has none. Fill its column 'label', or leave out such rows." in said


class TestData:
    @pytest.mark.parametrize(
        ("name", "content", "phrase"),
        [
            ("data.jsonl", "", "is empty (0 bytes)"),
            ("data.xlsx", "x", "must end in one of .jsonl, .json, .csv"),
            ("data", "x", "must end in one of .jsonl, .json, .csv"),
            ("data.jsonl", '{"text": "a"}\n{"text": \n', "JSON"),
        ],
    )
    def test_a_file_that_cannot_be_read(self, bert, tmp_path, name, content, phrase):
        (tmp_path / name).write_text(content)
        said = refuse(*flags(bert, tmp_path / name))
        assert phrase in said
        assert "An error occurred while generating" not in said

    def test_a_name_that_is_neither_a_file_nor_on_the_hub(self, bert, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        assert "there is no such local file or folder" in refuse(*flags(bert, Path("no-such-data")))

    @pytest.mark.parametrize("key", ["name", "data_files"])
    def test_keys_of_data_sets_are_refused_for_a_file(self, bert, data, tmp_path, key):
        calibration = {"path": str(data), "text": "text", key: "mnli"}
        said = refuse(recipe(tmp_path, {"model": str(bert), "calibration": calibration}))
        assert f"for which `{key}:` means nothing" in said

    def test_a_data_set_s_own_folder_is_read(self, bert, data, tmp_path):
        datasets.Dataset.from_list(ROWS[:3]).save_to_disk(tmp_path / "saved")
        succeed(*flags(bert, tmp_path / "saved"))
        found = fisher_of(bert)
        succeed(*flags(bert, data, "--force"))
        assert all(torch.equal(found[name], value) for name, value in fisher_of(bert).items())

    @pytest.mark.parametrize("message", [{"role": "user"}, {"role": "user", "content": None}])
    def test_a_message_without_content_is_no_chat(self, tmp_path, message):
        """A chat template would write `None`."""
        model = save_model(tmp_path / "llama", "llama", chat=CHAT_TEMPLATE)
        path = write_rows(tmp_path / "chats.jsonl", [{"chat": [message]}])
        assert "is no chat" in refuse("--model", model, "--path", path, "--messages", "chat")


class TestRecipes:
    @pytest.mark.parametrize(
        ("calibration", "phrase"),
        [
            ({"examples": True}, "examples: Value error, Input should be a number, got True"),
            (
                {"batch_size": True},
                "batch_size: Expected a number of examples above 0, or auto, got",
            ),
            (
                {"batch_size": 2.5},
                "batch_size: Expected a number of examples above 0, or auto, got",
            ),
            ({"seed": -1}, "seed: Input should be greater than or equal to 0, got -1"),
            ({"text": ["a"]}, "text: Expected a column, or a pair [first, second], got ['a']"),
            ({"text": 5}, "text: Expected a column, or a pair [first, second], got 5"),
        ],
    )
    def test_wrong_values_are_shown(self, tmp_path, calibration, phrase):
        path = recipe(tmp_path, {"model": "./m"}, calibration={"path": "d.jsonl", **calibration})
        assert phrase in refuse(path)

    @pytest.mark.parametrize("sidecar", [5, "", ["a"]])
    def test_a_sidecar_that_is_no_path(self, tmp_path, sidecar):
        path = recipe(tmp_path, {"model": "./m", "parameters": {"sidecar": sidecar}})
        assert "expected a folder or a .safetensors file" in refuse(path)

    def test_a_weight_beside_parameters_is_refused(self, tmp_path):
        path = recipe(tmp_path, {"model": "./m", "weight": 0.3}, exclude=["classifier"], floor=0.1)
        said = refuse(path)
        for name, where in (("weight", "./m"), ("exclude", "the recipe"), ("floor", "the recipe")):
            assert f"{name!r} of {where} has no effect there; write it under `parameters:`" in said

    def test_keys_of_one_s_own_stay(self, bert, data, tmp_path):
        own = {"path": str(data), "text": "text"}
        entry = {"model": str(bert), "comment": "good", "calibration": own}
        assert "Measured 1 of 1 models" in succeed(recipe(tmp_path, entry, notes="mine"))

    def test_a_parameter_of_no_type_is_one_line(self, tmp_path):
        path = recipe(tmp_path, {"model": "./m", "parameters": {"lambda": None}})
        assert refuse(path).count("models.0.parameters.lambda") == 1

    def test_a_model_s_own_chat_replaces_the_text_of_all(self, tmp_path):
        model = save_model(tmp_path / "llama", "llama", chat=CHAT_TEMPLATE)
        chats = [{"chat": [{"role": "user", "content": "we like the film"}]}]
        path = write_rows(tmp_path / "chats.jsonl", chats)
        entry = {"model": str(model), "calibration": {"messages": "chat"}}
        succeed(recipe(tmp_path, entry, calibration={"path": str(path), "text": "text"}))


class TestPlaces:
    def test_two_models_never_share_a_sidecar(self, tmp_path, bert, data):
        other = save_model(tmp_path / "other", num_labels=3, seed=1)
        shared = {"sidecar": str(tmp_path / "shared")}
        entries = [{"model": str(m), "parameters": shared} for m in (bert, other)]
        path = recipe(tmp_path, *entries, calibration={"path": str(data), "text": "text"})
        assert "would both be written to" in refuse(path)
        assert not (tmp_path / "shared").exists()

    def test_another_model_s_sidecar_is_not_written_over(self, tmp_path, bert, data):
        other = save_model(tmp_path / "other", num_labels=3, seed=1)
        succeed(*flags(other, data))
        before = snapshot(other / "sidecar")
        said = refuse(*flags(bert, data, "--out", other / "sidecar"))
        assert f"is the sidecar of other weights, measured as {other}" in said
        assert snapshot(other / "sidecar") == before
        succeed(*flags(bert, data, "--out", other / "sidecar", "--force"))

    def test_a_model_s_folder_is_no_sidecar(self, bert, data):
        before = sorted(bert.iterdir())
        assert "is a model's folder" in refuse(*flags(bert, data, "--out", bert))
        assert sorted(bert.iterdir()) == before

    def test_a_link_to_nowhere_is_found_before_measuring(self, bert, data, tmp_path):
        (bert / "sidecar").symlink_to(tmp_path / "nowhere")
        said = refuse(*flags(bert, data))
        assert "is not a folder that you may write to" in said
        assert "Measuring" not in said

    def test_a_file_is_no_model(self, bert, data):
        said = refuse(*flags(bert / "model.safetensors", data))
        assert "is a file; name the model's folder" in said


@pytest.mark.parametrize("size", ["x", "0", "-5", "5X", ""])
def test_a_shard_size_is_a_size(bert, data, size):
    assert "is not a size such as 5B" in refuse(*flags(bert, data, "--out-shard-size", size))


def test_what_goes_wrong_while_measuring_names_the_model(tmp_path):
    model = save_model(tmp_path / "llama", "llama")
    path = write_rows(tmp_path / "short.jsonl", [{"text": "we"}])
    assert f"{model}: the Fisher is zero everywhere" in refuse(*flags(model, path))


def test_help_begins_with_two_commands_on_lines_of_their_own():
    lines = CliRunner().invoke(main, ["--help"]).output.splitlines()
    commands = [line.split()[0] for line in lines if "recipe.yml" in line]
    assert commands == ["mergekit-fisher", "mergekit-yaml"]


@pytest.mark.parametrize("model", ["a+b+c", "a@1@2"])
def test_a_model_that_cannot_be_parsed(model):
    said = refuse("--model", model, "--path", "x.jsonl", "--text", "text")
    assert f"--model {model}: " in said
    assert "A model is written MODEL, MODEL@REVISION or MODEL+ADAPTER." in said


def test_the_next_command_is_for_a_shell(bert, data, tmp_path):
    place = tmp_path / "my recipes"
    place.mkdir()
    calibration = {"path": str(data), "text": "text"}
    path = recipe(place, {"model": str(bert), "calibration": calibration})
    assert f"Next: mergekit-yaml '{path}' merged/" in succeed(path)


def test_several_recipes_in_one_file(tmp_path):
    path = recipe(tmp_path, {"model": "./m"})
    path.write_text(f"{path.read_text()}---\n{path.read_text()}")
    assert "holds several recipes, as for mergekit-multi" in refuse(path)
