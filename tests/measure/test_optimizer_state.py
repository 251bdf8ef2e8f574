"""Whose an optimizer's states are: what is told apart, and what is refused, each in a sentence."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import read, rewrite
from tiny import save_model
from torch import nn
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, RMSprop
from training import load, loop, train

from fisher_mergekit.errors import FisherMergekitError, MeasureError
from fisher_mergekit.measure.job import Job
from fisher_mergekit.measure.precompute import prepare
from fisher_mergekit.measure.sources.optimizer import read_state
from fisher_mergekit.measure.sources.order import assign
from fisher_mergekit.recipe import Calibration

pytestmark = pytest.mark.slow  # exhaustive: not needed at every change


def refused(model: Path, optimizer: Path | None = None, kind: str = "fisher") -> str:
    """Return the one sentence with which a state is refused, before a model is loaded."""
    job = Job(
        reference=str(model), revision=None, folder=model, tokenizer=model,
        present=(model / "sidecar",), out=model / "sidecar", kinds=(kind,),
        calibration=Calibration(optimizer=str(optimizer or model / "optimizer.pt")),
    )  # fmt: skip
    with pytest.raises(FisherMergekitError) as caught:
        prepare(job)
    assert not (model / "sidecar").exists()
    return caught.value.message


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Trainer's checkpoint of BERT: never written to."""
    folder = tmp_path_factory.mktemp("trained")
    train(load(save_model(folder / "start"), "bert"), "bert", folder / "run", weight_decay=0.01)
    return folder / "run" / "checkpoint-4"


@pytest.fixture
def checkpoint(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "checkpoint-4"))


def change(checkpoint: Path, how: Callable[[dict], object]) -> None:
    path = checkpoint / "optimizer.pt"
    content = torch.load(path, weights_only=True)
    how(content)
    torch.save(content, path)


def swap_groups(content: dict) -> None:
    """Exchange what the two groups are: their settings go with the wrong parameters."""
    first, second = content["param_groups"]
    first["weight_decay"], second["weight_decay"] = 0.0, 0.01


def swap_ids(content: dict) -> None:
    """Exchange two states of equal shape, as a program that renumbers them could."""
    ids = content["param_groups"][0]["params"]
    assert content["state"][3]["exp_avg_sq"].shape == content["state"][4]["exp_avg_sq"].shape
    ids[3], ids[4] = ids[4], ids[3]


def negate(content: dict) -> None:
    content["state"][5]["exp_avg_sq"].neg_()


def spoil(content: dict) -> None:
    content["state"][5]["exp_avg_sq"].view(-1)[0] = torch.nan


@pytest.mark.parametrize(
    ("how", "phrase"),
    [
        (swap_groups, "does not belong to this BertForSequenceClassification"),
        (swap_ids, "does not number its parameters from 0 in the order of its groups"),
        (lambda content: content["state"].update({99: {}}), "does not number its parameters"),
        (negate, "exp_avg_sq of parameter 5 holds NaN, infinity or negative numbers"),
        (spoil, "exp_avg_sq of parameter 5 holds NaN"),
        (lambda content: content["state"].clear(), "is empty: saved before the first step"),
        (lambda content: content["state"][2].pop("exp_avg_sq"), "parameter 2 has the state step"),
        (lambda content: content["state"][2].update(step="many"), "is no state of Adam's"),
        (lambda content: content["state"][2].update(step=-1.0), "after step -1.0; expected"),
        (lambda content: content["param_groups"][0].update(betas=(0.9, 1.5)), "a beta of 1.5"),
        (lambda content: content.pop("state"), "is no optimizer's state: expected"),
        (lambda content: [g.pop("params") for g in content["param_groups"]], "no optimizer's"),
    ],
)  # fmt: skip
def test_a_state_that_was_changed(checkpoint: Path, how: Callable, phrase: str) -> None:
    change(checkpoint, how)
    assert phrase in refused(checkpoint)


def adafactor(model):
    from transformers.optimization import Adafactor

    return Adafactor(model.parameters(), lr=1e-3, relative_step=False)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (adafactor, "Adafactor"),
        (lambda model: torch.optim.Adafactor(model.parameters()), "Adafactor"),
        (lambda model: SGD(model.parameters(), lr=0.1, momentum=0.9), "SGD"),
        (lambda model: SGD(model.parameters(), lr=0.1), "of SGD, which keeps nothing"),
        (lambda model: Adamax(model.parameters()), "Adamax"),
        (lambda model: Adagrad(model.parameters()), "Adagrad"),
        (lambda model: RMSprop(model.parameters()), "RMSprop"),
    ],
)
def test_other_optimizers_are_refused_by_name(make, name: str, tmp_path: Path) -> None:
    loop(load(save_model(tmp_path / "start"), "bert"), "bert", tmp_path / "end", make)
    said = refused(tmp_path / "end")
    assert name in said
    assert "Only Adam's and AdamW's exp_avg_sq" in said


def test_eight_bit_states_are_refused_by_name(checkpoint: Path) -> None:
    def quantise(content: dict) -> None:
        for state in content["state"].values():
            state["state1"] = state.pop("exp_avg").to(torch.uint8)
            state["state2"] = state.pop("exp_avg_sq").to(torch.uint8)

    change(checkpoint, quantise)
    assert "is of an optimizer of bitsandbytes, most often in 8 bits" in refused(checkpoint)


def test_the_optimizer_of_a_model_of_another_size(checkpoint: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", num_hidden_layers=1)
    alone = shutil.copy(checkpoint / "optimizer.pt", tmp_path)
    said = refused(other, Path(alone))
    assert "keeps the states of 41 parameters in groups of 17 and 24, the model has 25" in said


def test_the_optimizer_of_a_model_of_another_width(checkpoint: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", intermediate_size=10)
    alone = shutil.copy(checkpoint / "optimizer.pt", tmp_path)
    said = refused(other, Path(alone))
    assert (
        "a state of shape [12, 8] stands where bert.encoder.layer.0.intermediate.dense.weight "
        "[10, 8] would"
    ) in said


def test_the_optimizer_of_another_training_of_the_same_model(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Shapes cannot tell; the weights beside it can."""
    other = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    weights = read(other)
    rewrite(other, weights | {"classifier.bias": weights["classifier.bias"] + 1})
    said = refused(other, checkpoint)
    assert "belongs to the weights beside it" in said
    assert "(classifier.bias differs)" in said


def test_the_optimizer_of_an_adapter(checkpoint: Path, tmp_path: Path) -> None:
    """LoRA trains other parameters, and fewer."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load(checkpoint, "bert"), LoraConfig(target_modules=["query"], r=2))
    train(model, "bert", tmp_path / "run")
    alone = shutil.copy(tmp_path / "run" / "checkpoint-4" / "optimizer.pt", tmp_path)
    said = refused(checkpoint, Path(alone))
    assert "4 parameters" in said
    assert "An adapter (LoRA) was trained, or part of the model" in said


def test_a_trainer_that_froze_a_part_does_not_say_which(tmp_path: Path) -> None:
    model = load(save_model(tmp_path / "start"), "bert")
    model.bert.embeddings.requires_grad_(False)
    train(model, "bert", tmp_path / "run")
    assert "or part of the model" in refused(tmp_path / "run" / "checkpoint-4")


def test_a_missing_file_and_where_there_is_one(checkpoint: Path) -> None:
    said = refused(checkpoint, checkpoint.parent)
    assert f"There is one in {checkpoint}; name that." in said
    (checkpoint / "optimizer.pt").unlink()
    assert "unless save_only_model is set" in refused(checkpoint, checkpoint)
    assert "does not exist" in refused(checkpoint, checkpoint / "optimizer.pt")
    (checkpoint / "global_step4").mkdir()
    assert "DeepSpeed or FSDP" in refused(checkpoint, checkpoint)


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_a_file_that_is_cut_short(checkpoint: Path, keep: float) -> None:
    path = checkpoint / "optimizer.pt"
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    said = refused(checkpoint)
    assert str(path) in said
    assert "cut short" in said or "damaged" in said


def test_something_else_than_a_state(checkpoint: Path) -> None:
    (checkpoint / "optimizer.pt").write_text("a text")
    assert "damaged" in refused(checkpoint)
    torch.save([1, 2], checkpoint / "optimizer.pt")
    assert "is no optimizer's state" in refused(checkpoint)


class _Hostile:
    """What a hostile pickle does: it runs something when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("plain", [False, True], ids=["torch.save", "pickle"])
def test_code_in_a_pickle_is_not_run(checkpoint: Path, tmp_path: Path, plain: bool) -> None:
    hostile, path = _Hostile(tmp_path / "it ran"), checkpoint / "optimizer.pt"
    if plain:
        path.write_bytes(pickle.dumps({"state": hostile}))
    else:
        torch.save({"state": hostile}, path)
    said = refused(checkpoint)
    assert "holds more than tensors and numbers" in said
    assert plain or f"{os.name}.mkdir, which is neither" in said
    assert not (tmp_path / "it ran").exists()


def test_a_kind_that_is_no_diagonal(checkpoint: Path) -> None:
    assert "an optimizer's state has no gram" in refused(checkpoint, kind="gram")


def test_an_old_file_format_is_read(checkpoint: Path) -> None:
    """It cannot be mapped."""
    groups = read_state(checkpoint).groups
    before = [[m.corrected() for m in group.moments] for group in groups]
    content = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    torch.save(content, checkpoint / "optimizer.pt", _use_new_zipfile_serialization=False)
    after = read_state(checkpoint)
    for values, group in zip(before, after.groups, strict=True):
        for value, moment in zip(values, group.moments, strict=True):
            assert torch.equal(value, moment.corrected())


def test_a_note_of_another_step_is_not_believed(checkpoint: Path) -> None:
    from fisher_mergekit.measure.sources.adam import _batch_size

    assert _batch_size(read_state(checkpoint)) == 4
    notes = checkpoint / "trainer_state.json"
    notes.write_text(json.dumps(json.loads(notes.read_text()) | {"global_step": 8}))
    assert _batch_size(read_state(checkpoint)) is None
    notes.write_text("[")
    assert _batch_size(read_state(checkpoint)) is None


class _Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class _RootNorm(_Scale):
    pass


class _Odd(nn.Module):
    """Two vectors, each of which one of two rules takes for a norm; shapes cannot tell them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = _Scale()
        self.root = _RootNorm()


def test_where_two_rules_fit_and_differ_none_is_chosen(tmp_path: Path) -> None:
    model = _Odd()
    optimizer = Adam(
        [{"params": [p]} for p in (model.norm.weight, model.root.weight)], weight_decay=0.0
    )
    (model.norm.weight.sum() + 2 * model.root.weight.sum()).backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(MeasureError, match=r"one could be of root\.weight or of norm\.weight"):
        assign(read_state(tmp_path), model)


def test_names_that_the_optimizer_was_given_settle_it(tmp_path: Path) -> None:
    model = _Odd()
    named = [("root.weight", model.root.weight), ("norm.weight", model.norm.weight)]
    optimizer = AdamW([{"params": [pair]} for pair in named])
    (model.norm.weight.sum() + 2 * model.root.weight.sum()).backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    found = assign(read_state(tmp_path), model)
    assert {name: float(m.corrected().mean()) for name, m in found.items() if m} == pytest.approx(
        {"norm.weight": 1.0, "root.weight": 4.0}
    )
