"""`mergekit-fisher precompute --kind …`: the factors that a sidecar holds, by the names on disk."""

from __future__ import annotations

import shutil

import factor_oracle
import pytest
import tiny
import torch
from models import read
from precomputing import fisher_of, flags, refuse, snapshot, succeed, write_recipe
from tiny import ROWS, write_rows
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fisher_mergekit.sidecar.reader import Sidecar

pytestmark = pytest.mark.slow  # exhaustive: not needed at every change


@pytest.fixture
def data(tmp_path):
    return write_rows(tmp_path / "data.jsonl")


def examples_of(folder, *names):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = [tokenizer(row["text"]) for row in ROWS]
    return [
        tiny.labelled(i, e["input_ids"], **{k: e[k] for k in names}) for i, e in enumerate(encoded)
    ]


def bert_oracle(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder).double()
    found = factor_oracle.measure(
        model, examples_of(folder, "token_type_ids"), factor_oracle.classes
    )
    return found.inputs, found.rows, found.outputs


def close(found, expected, tolerance=1e-5):
    error = (found.double() - expected).norm()
    assert error <= tolerance * expected.norm().clamp_min(1e-30)


def test_several_kinds_are_measured_in_one_pass(bert, data):
    said = succeed(*flags(bert, data, "--kind", "fisher,gram,kfac"))
    assert said.count("read 7 examples") == 1
    inputs, rows, outputs = bert_oracle(bert)
    gram, kfac = Sidecar(bert / "sidecar", "gram"), Sidecar(bert / "sidecar", "kfac")
    tables = {name for name in read(bert) if "embeddings" in name and "LayerNorm" not in name}
    assert set(gram.weights) == set(kfac.weights) == inputs.keys() | tables
    for name, moment in inputs.items():
        (stored,) = gram.stored(name)
        close(gram.load(stored), moment / len(ROWS))
        of_inputs, of_outputs = kfac.stored(name)
        close(kfac.load(of_inputs), moment / rows[name])
        close(kfac.load(of_outputs), outputs[name] / len(ROWS), 1e-3)  # gradients nearly cancel
    assert gram.measurement.unmeasured["classifier.bias"] == "not described by gram"
    alone = fisher_of(bert)
    succeed(*flags(bert, data, "--kind", "fisher", "--force"))
    assert all(torch.equal(alone[name], value) for name, value in fisher_of(bert).items())


def test_queries_keys_and_values_are_stored_once(bert, data):
    succeed(*flags(bert, data, "--kind", "gram"))
    gram = Sidecar(bert / "sidecar", "gram")
    attention = "bert.encoder.layer.0.attention.self.{}.weight"
    stored = {gram.stored(attention.format(name)) for name in ("query", "key", "value")}
    assert len(stored) == 1
    settings = gram.measurement.settings
    assert (settings.estimator, settings.unit, settings.likelihood) == ("none",) * 3


def test_only_the_kinds_that_are_missing_are_measured(bert, data):
    succeed(*flags(bert, data, "--kind", "gram"))
    before = snapshot(bert / "sidecar")["gram.safetensors"]
    succeed(*flags(bert, data, "--kind", "gram,fisher", "--estimator", "exact"))
    assert snapshot(bert / "sidecar")["gram.safetensors"] == before
    assert fisher_of(bert)
    said = succeed(*flags(bert, data, "--kind", "fisher,gram", "--estimator", "exact"))
    assert "is valid, nothing to measure" in said


@pytest.mark.parametrize(
    ("method", "parameters", "kinds"),
    [
        ("regmean", {}, {"gram"}),
        ("regmean", {"others": "fisher"}, {"gram", "fisher"}),
        ("mats", {}, {"kfac"}),
        ("mats", {"others": [{"filter": "norm", "value": "fisher"}, {"value": "mean"}]},
         {"kfac", "fisher"}),
    ],
)  # fmt: skip
def test_a_recipe_measures_what_its_merge_reads(bert, data, tmp_path, method, parameters, kinds):
    calibration = {"path": str(data), "text": "text"}
    path = write_recipe(
        tmp_path, bert, calibration=calibration, merge_method=method, parameters=parameters
    )
    succeed(path)
    assert {p.stem for p in (bert / "sidecar").glob("*.safetensors")} == kinds


@pytest.mark.parametrize("prior", [True, [{"filter": "norm", "value": False}, {"value": True}]])
def test_a_prior_is_measured_with_the_models(originals, bert, data, tmp_path, prior):
    base = shutil.copytree(originals["other"], tmp_path / "base")
    said = succeed(
        write_recipe(
            tmp_path,
            bert,
            calibration={"path": str(data), "text": "text"},
            base_model=str(base),
            parameters={"prior": prior, "prior_sidecar": str(tmp_path / "prior")},
        )
    )
    assert "Measured 2 of 2 models" in said
    assert Sidecar(tmp_path / "prior", "fisher").header.model.reference == str(base)


def test_an_unknown_kind_is_refused(bert, data):
    said = refuse(*flags(bert, data, "--kind", "gram,hessian"))
    assert "'hessian' is not one of fisher, gram, kfac." in said


def test_each_expert_has_its_own_factors_by_its_names_on_disk(tmp_path, data):
    folder = tiny.save_model(tmp_path / "moe", "mixtral")
    succeed(*flags(folder, data, "--kind", "gram,kfac"))
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    model.set_experts_implementation("eager")
    found = factor_oracle.measure(model, examples_of(folder), factor_oracle.nothing)
    inputs, rows = found.inputs, found.rows
    gram, kfac = Sidecar(folder / "sidecar", "gram"), Sidecar(folder / "sidecar", "kfac")
    stored = read(folder)
    for expert in range(model.config.num_local_experts):
        for name, of in (("w1", "gate_up_proj"), ("w3", "gate_up_proj"), ("w2", "down_proj")):
            on_disk = f"model.layers.0.block_sparse_moe.experts.{expert}.{name}.weight"
            packed = f"model.layers.0.mlp.experts.{of}"
            assert on_disk in stored
            (file,) = gram.stored(on_disk)
            close(gram.load(file), inputs[packed][expert] / len(ROWS))
            of_inputs, of_outputs = kfac.stored(on_disk)
            close(kfac.load(of_inputs), inputs[packed][expert] / rows[packed][expert].clamp_min(1))
            assert kfac.load(of_outputs).shape == (len(stored[on_disk]),) * 2
        w1, w3 = (
            f"model.layers.0.block_sparse_moe.experts.{expert}.{w}.weight" for w in ("w1", "w3")
        )
        assert gram.stored(w1) == gram.stored(w3)
        assert kfac.stored(w1) != kfac.stored(w3)


def test_conv1d_and_a_tied_head(tmp_path, data):
    folder = tiny.save_model(tmp_path / "gpt2", "gpt2")
    succeed(*flags(folder, data, "--kind", "gram"))
    gram = Sidecar(folder / "sidecar", "gram")
    factors = gram.measurement.factors
    weights = read(folder)
    assert factors["transformer.h.0.mlp.c_fc.weight"].input_axis == -2
    double = AutoModelForCausalLM.from_pretrained(folder).double()
    found = factor_oracle.measure(double, examples_of(folder), factor_oracle.nothing)
    for name, moment in found.inputs.items():
        assert name in weights
        close(gram.load(gram.stored(name)[0]), moment / len(ROWS))
    assert factors["transformer.wte.weight"].input_axis == -1


def test_gradient_checkpointing_changes_nothing(tmp_path, data):
    folder = tiny.save_model(tmp_path / "llama", "llama")
    kinds = ["--kind", "fisher,kfac"]
    succeed(*flags(folder, data, *kinds))
    succeed(*flags(folder, data, *kinds, "--gradient-checkpointing", "--out", tmp_path / "again"))
    one, other = Sidecar(folder / "sidecar", "kfac"), Sidecar(tmp_path / "again", "kfac")
    for name in one:
        close(other.load(name), one.load(name).double())
