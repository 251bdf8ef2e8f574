"""Models that bring their own code: refused without `--trust-remote-code`, and measured with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import merge_oracle
import oracles
import pytest
import tiny
import torch
import training
import transformers
from hub import Hub
from huggingface_hub import constants
from models import read
from oracles import assert_same_fishers
from precomputing import fisher_of, flags, refuse, succeed, write_recipe
from running import assert_close, merged, recipe_of

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class {family}Config(LlamaConfig):
    model_type = "{kind}"


class {family}ForCausalLM(LlamaForCausalLM):
    config_class = {family}Config

    def forward(self, *args, **kwargs):
        result = super().forward(*args, **kwargs)
        result.logits = 0.5 * result.logits
        return result
"""
"""A Llama that is half as sure of everything."""


def save(folder: Path, family: str = "Toy", seed: int = 0) -> Path:
    """Save a model with a class of its own."""
    tiny.save_model(folder, "llama", seed=seed)
    kind = family.lower()
    (folder / f"{kind}_code.py").write_text(CODE.format(family=family, kind=kind))
    path = folder / "config.json"
    content = json.loads(path.read_text()) | {
        "model_type": kind,
        "architectures": [f"{family}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{kind}_code.{family}Config",
            "AutoModelForCausalLM": f"{kind}_code.{family}ForCausalLM",
        },
    }
    path.write_text(json.dumps(content))
    return folder


@pytest.fixture(autouse=True)
def _modules(tmp_path, monkeypatch):
    """transformers copies such code into a cache; not into the user's."""
    place = str(tmp_path / "modules")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", place)
    monkeypatch.syspath_prepend(place)


def by_loop(folder: Path) -> dict:
    """Return the empirical Fisher of the model with its own code, example by example."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer(row["text"])["input_ids"] for row in tiny.ROWS]
    examples = [tiny.text(i, ids) for i, ids in enumerate(texts)]
    given = {example.number: tiny.ids_of(example) for example in examples}
    return oracles.causal_lm_given(model.eval(), examples, given)


@pytest.mark.parametrize("family", ["Toy", "Llama"])
def test_measured_by_its_own_code(tmp_path, data, family):
    """Also where transformers has a class of the very same name."""
    model = save(tmp_path / "model", family)
    succeed(*flags(model, data, "--estimator", "empirical", "--trust-remote-code"))
    assert_same_fishers(fisher_of(model), by_loop(model))


LACKING = """
from torch import nn
from transformers import LlamaConfig
from transformers import LlamaForCausalLM as Llama


class LlamaForCausalLM(Llama):
    def __init__(self, config):
        super().__init__(config)
        self.model.norm = nn.Identity()
"""
"""A class of the name of one of transformers, with a parameter less."""


def adam(model):
    return torch.optim.AdamW(model.parameters(), betas=(0.9, training.BETA2))


def test_an_optimizer_of_a_class_that_transformers_knows_otherwise(tmp_path, data):
    folder = tiny.save_model(tmp_path / "start", "llama")
    (folder / "llama_code.py").write_text(LACKING)
    content = json.loads((folder / "config.json").read_text())
    content["auto_map"] = {"AutoModelForCausalLM": "llama_code.LlamaForCausalLM"}
    (folder / "config.json").write_text(json.dumps(content))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    trained = tmp_path / "trained"
    oracle = training.loop(model, "llama", trained, adam)
    assert "model.norm.weight" not in read(trained)
    succeed("--model", trained, "--optimizer", trained, "--trust-remote-code")
    assert_same_fishers(fisher_of(trained), oracle.in_files(model, trained))


def test_refused_without_the_flag(tmp_path, data):
    message = refuse(*flags(save(tmp_path / "model"), data))
    assert "brings code of its own, which is not run unasked" in message
    assert "add --trust-remote-code, here and for mergekit-yaml." in message
    assert not (tmp_path / "modules").exists()


def test_measured_and_merged(tmp_path, data):
    a, b = (save(tmp_path / name, seed=i) for i, name in enumerate("ab"))
    recipe = write_recipe(tmp_path, a, b, calibration={"path": str(data), "text": "text"})
    said = succeed(recipe, "--trust-remote-code")
    assert f"Next: mergekit-yaml {recipe} merged/ --trust-remote-code" in said
    found = merged(recipe_of(a, b), tmp_path / "out", trust_remote_code=True)
    thetas, fishers = [read(a), read(b)], [fisher_of(a), fisher_of(b)]
    assert_close(found, merge_oracle.merge(thetas, fishers, [1, 1], list(thetas[0])))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True
    )
    assert type(model).__name__ == "ToyForCausalLM"
    assert all(torch.equal(p, found[n]) for n, p in model.named_parameters())
    with pytest.raises(ValueError, match="trust_remote_code"):  # by mergekit itself
        merged(recipe_of(a, b), tmp_path / "refused")


def test_code_that_mergekit_leaves_behind_is_named(tmp_path, data, caplog):
    """It writes the configuration's file only."""
    a, b = (save(tmp_path / name, seed=i) for i, name in enumerate("ab"))
    for folder in (a, b):
        code = (folder / "toy_code.py").read_text()
        head, _, tail = code.partition("class ToyForCausalLM")
        (folder / "toy_code.py").write_text(head)
        imported = "from transformers import LlamaForCausalLM\nfrom .toy_code import ToyConfig\n"
        (folder / "toy_model.py").write_text(f"{imported}class ToyForCausalLM{tail}")
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"]["AutoModelForCausalLM"] = "toy_model.ToyForCausalLM"
        (folder / "config.json").write_text(json.dumps(config))
        succeed(*flags(folder, data, "--trust-remote-code"))
    merged(recipe_of(a, b), tmp_path / "out", trust_remote_code=True)
    (message,) = [m for m in caplog.messages if "own code" in m]
    assert "put toy_model.py, and what is imported there, into the merge's folder" in message
    arguments = {"trust_remote_code": True}
    with pytest.raises(OSError, match=r"toy_model\.py"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", **arguments)
    shutil.copy(a / "toy_model.py", tmp_path / "out")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", **arguments)


def test_the_code_of_a_model_of_the_hub_is_fetched(tmp_path, data, monkeypatch):
    hub = Hub()
    hub.publish("me/toy", save(tmp_path / "model"))
    monkeypatch.setenv("FISHER_MERGEKIT_HOME", str(tmp_path / "own"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.cached("me/toy", tmp_path / "hub")
    arguments = ("--model", "me/toy", "--path", data, "--text", "text")
    assert "brings code of its own" in refuse(*arguments)
    assert "Measured 1 of 1" in succeed(*arguments, "--trust-remote-code")
