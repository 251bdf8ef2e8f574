"""Every way to go wrong with `mergekit-fisher precompute`, each with its sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from models import read, rewrite
from precomputing import flags, refuse, write_recipe
from tiny import ROWS, write_rows

from fisher_mergekit.measure.estimators import exact


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
            (
                ROWS,
                ["--batch-size", "0"],
                "batch_size: Expected a number of examples above 0, or auto, got '0'.",
            ),
            (ROWS, ["--batch-size", "all"], "examples above 0, or auto, got 'all'."),
            (ROWS, ["--split", "test"], "split 'test'"),
            (ROWS, ["--messages", "text"], "text:"),
            (ROWS, ["--mask-prompt"], "BertForSequenceClassification scores no prompt anyway"),
        ],
    )  # fmt: skip
    def test_calibration(self, bert, tmp_path, rows, options, phrase):
        data = write_rows(tmp_path / "data.jsonl", rows)
        named = [] if "--text" in options else ["--text", "text"]
        said = refuse("--model", bert, "--path", data, *named, *options)
        assert phrase in said

    def test_a_prompt_that_is_not_named(self, gpt2, data):
        assert "mask_prompt needs to know the prompt" in refuse(*flags(gpt2, data, "--mask-prompt"))

    def test_no_data(self, bert):
        assert "no calibration data. Add `calibration:" in refuse("--model", bert)

    def test_data_that_does_not_exist(self, bert):
        said = refuse(*flags(bert, "nowhere.jsonl"))
        assert "calibration data nowhere.jsonl does not exist" in said

    def test_data_that_is_a_model(self, bert):
        assert f"calibration data {bert} is a model's folder" in refuse(*flags(bert, bert))

    def test_data_without_a_named_column(self, bert, data):
        assert "name either the text column(s), `text:` (--text)" in refuse(
            "--model", bert, "--path", data
        )

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
             "estimator: Input should be 'empirical', 'exact' or 'sampled'"),
            ("merge_method: fisher\nmodels: [{model: ./a}]\ncalibration: 7",
             "expected a mapping of keys, got 7"),
            ("merge_method: fisher\nmodels: [{model: ./a, parameters: {lamda: 1}}]",
             "unknown parameter 'lamda'. Did you mean 'lambda'?"),
            ("merge_method: fishr\nmodels: [{model: ./a}]",
             "'fishr' needs nothing measured. Did you mean 'fisher'? Methods that do: fisher"),
            ("merge_method: fisher\nbase_modle: ./a\nmodels: [{model: ./a}]",
             "the recipe: unknown key 'base_modle'. Did you mean 'base_model'?"),
            ("merge_method: fisher\nmodels: [{model: ./a, calibrations: {path: x}}]",
             "./a: unknown key 'calibrations'. Did you mean 'calibration'?"),
            ("merge_method: fisher\nmodels: [{model: ./a}]\ntokenizer: {sorce: union}",
             "tokenizer: unknown key 'sorce'. Did you mean 'source'?"),
            ("merge_method: fisher\nslices: [{sources: [{model: ./a, layer_rang: [0, 1], "
             "layer_range: [0, 1]}]}]",
             "./a in slice 0: unknown key 'layer_rang'. Did you mean 'layer_range'"),
            ("merge_method: fisher\nmodels: [{model: ./a, calibration: *data}]",
             "is not readable YAML: found undefined alias 'data'"),
            ("merge_method: fisher\nname: 2024-02-30\nmodels: [{model: ./a}]",
             "is not readable YAML: day is out of range for month"),
            ("merge_method: fisher\nmodels: [{model: a+b+c}]",
             "is not a mergekit recipe: Can't parse a+b+c"),
            ("merge_method: fisher\nmodels: [{model: ./a}]\ndtype: fp16",
             "dtype: 'fp16' is not one of float32, float16, bfloat16, float64."),
            ("merge_method: fisher\nmodels: [{model: ./a}]\nchat_template: lama3",
             "neither auto, nor a template, nor one that mergekit has: alpaca, "),
            ("merge_method: fisher\nmodels: [{model: ./a}, {model: ./a}]",
             "./a is listed twice in one merge"),
            ("merge_method: fisher\nmodels: [{model: ./a}]\nparameters: {exclude: [head]}",
             "the recipe names none. Add `base_model:`"),
            ("merge_method: fisher\nmodels: [{model: ./a, parameters: {sidecar: ~/side}}]",
             f"sidecar: ~/side: only a shell knows ~; write {Path.home()}/side."),
            ("merge_method: fisher\nmodels: [{model: ./a, calibration: {path: ~/texts.txt}}]",
             f"path: ~/texts.txt: only a shell knows ~; write {Path.home()}/texts.txt."),
            ("merge_method: fisher\nmodels: [{model: ./a, calibration: {path: ''}}]",
             "path is empty; leave it out, or name a file."),
        ],
    )  # fmt: skip
    def test_recipe(self, tmp_path, text, phrase):
        path = tmp_path / "recipe.yml"
        if text is not None:
            path.write_text(text)
        assert phrase in refuse(path)

    def test_an_adapter_alone_is_nothing_to_merge(self, tmp_path, bert, data):
        adapter = tmp_path / "adapter"
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text("{}")
        calibration = {"path": str(data), "text": "text"}
        said = refuse(write_recipe(tmp_path, bert, adapter, calibration=calibration))
        assert f"{adapter} is an adapter alone, which mergekit does not merge." in said
        assert f"before it: MODEL+{adapter}." in said

    def test_a_model_s_own_file_as_sidecar(self, tmp_path, bert, data):
        said = refuse(*flags(bert, data, "--out", bert / "model.safetensors"))
        assert f"name the folder, `sidecar: {bert / 'sidecar'}`." in said

    def test_all_wrong_keys_are_told_at_once(self, tmp_path):
        path = tmp_path / "recipe.yml"
        path.write_text("merge_method: fisher\nmodels: [{model: ./a, weight: 1, parameter: {}}]")
        said = refuse(path)
        assert "2 problems:" in said
        assert f"1. {path}: 'weight' of ./a has no effect there" in said
        assert f"2. {path}: ./a: unknown key 'parameter'. Did you mean 'parameters'?" in said

    def test_a_model_that_the_recipe_does_not_have(self, bert, tmp_path):
        recipe = write_recipe(tmp_path, bert, calibration={"path": "x", "text": "text"})
        assert "has no model './b'; it has" in refuse(recipe, "--model", "./b")

    def test_a_missing_model_folder(self, data, tmp_path):
        said = refuse(*flags(tmp_path / "gone", data))
        assert f"{tmp_path / 'gone'} is neither a local folder nor" in said
        assert f"{Path.cwd()}, to which paths are relative, has no such folder" in said

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
            ({"architectures": ["BertForPreTraining"]}, "known for BertForPreTraining"),
            (
                {
                    "id2label": {"0": "only"},
                    "label2id": {"only": 0},
                    "problem_type": "single_label_classification",
                },
                'or use `problem_type="regression"`',
            ),
            ({"problem_type": "ranking"}, "no likelihood is known for"),
            ({"hidden_size": -8}, "describes no BertForSequenceClassification"),
            ({"num_attention_heads": 3}, "describes no BertForSequenceClassification"),
            ({"hidden_size": "wide"}, "is not a model that transformers can read"),
        ],
    )  # fmt: skip
    def test_configurations_that_cannot_be_measured(self, bert, data, change, phrase):
        config = json.loads((bert / "config.json").read_text())
        (bert / "config.json").write_text(json.dumps({**config, **change}))
        assert phrase in refuse(*flags(bert, data))

    def test_exact_on_a_causal_lm(self, gpt2, tmp_path, monkeypatch):
        """Of twelve tokens eleven are predicted, each out of 24: 253 passes."""
        data = write_rows(tmp_path / "data.jsonl", [{"text": "cat " * 50}])
        monkeypatch.setattr(exact, "MAX_PASSES", 252)
        said = refuse(*flags(gpt2, data, "--estimator", "exact"))
        assert "would need 253 backward passes for each batch, and more than 252 are" in said
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
