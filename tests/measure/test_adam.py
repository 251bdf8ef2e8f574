"""Adam's second moment from a training's files, against the mean of the gradients themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import read
from running import assert_close
from tiny import save_model
from torch.optim import Adam, AdamW
from training import BETA2, load, loop, train

from fisher_mergekit.measure.job import Job
from fisher_mergekit.measure.precompute import precompute, prepare
from fisher_mergekit.recipe import Calibration
from fisher_mergekit.sidecar.reader import Sidecar

pytestmark = pytest.mark.slow  # exhaustive: not needed at every change


def taken(model: Path, optimizer: Path | None = None, **calibration: object) -> Sidecar:
    """Read the optimizer's state for a model; return the sidecar."""
    job = Job(
        reference=str(model), revision=None, folder=model, tokenizer=model,
        present=(model / "sidecar",), out=model / "sidecar", kinds=("fisher",),
        calibration=Calibration(optimizer=str(optimizer or model), **calibration),
    )  # fmt: skip
    precompute(prepare(job))
    return Sidecar(model / "sidecar", "fisher")


def values(sidecar: Sidecar) -> dict[str, torch.Tensor]:
    return {name: sidecar.load(name) for name in sidecar}


CLOSE = {"rtol": 2e-6, "atol": 1e-30}

FAMILIES: dict[str, dict] = {
    **{family: {} for family in ("bert", "gpt2", "llama", "qwen2", "mixtral")},
    "t5": {"decoder_start_token_id": 0},
}
"""With a head, tied, with packed experts, with an encoder and a decoder; and their settings."""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}], ids=["plain", "decay"])
def test_a_trainer_s_checkpoint_gives_the_mean_square_of_the_gradients(
    family: str, options: dict, tmp_path: Path
) -> None:
    model = load(save_model(tmp_path / "start", family, **FAMILIES[family]), family)
    oracle = train(model, family, tmp_path / "run", **options)
    checkpoint = tmp_path / "run" / "checkpoint-4"
    found = values(taken(checkpoint))
    assert_close(found, oracle.in_files(model, tmp_path / "oracle"), **CLOSE)
    assert found.keys() == read(checkpoint).keys()


@pytest.mark.parametrize(
    "options",
    [
        {"optim": "adamw_torch"},
        {"optim": "adamw_torch_fused"},
        {"max_grad_norm": 0.0},
        {"gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_however_the_trainer_takes_its_steps(options: dict, tmp_path: Path) -> None:
    model = load(save_model(tmp_path / "start", "bert"), "bert")
    oracle = train(model, "bert", tmp_path / "run", **options)
    found = values(taken(tmp_path / "run" / "checkpoint-4"))
    assert_close(found, oracle.in_files(model, tmp_path / "oracle"), **CLOSE)


def _one_group(model):
    return AdamW(model.parameters(), betas=(0.9, BETA2))


def _named(model):
    return Adam(list(model.named_parameters())[::-1], betas=(0.9, BETA2))


def _amsgrad(model):
    return AdamW(model.parameters(), betas=(0.9, BETA2), amsgrad=True)


def _halves(*parts: str, decay: float):
    """Return the two groups of many scripts; the names with one of the parts are not decayed."""

    def make(model):
        parameters = list(model.named_parameters())
        less = [p for n, p in parameters if any(part in n for part in parts)]
        more = [p for n, p in parameters if not any(part in n for part in parts)]
        groups = [{"params": more, "weight_decay": decay}, {"params": less, "weight_decay": 0.0}]
        return AdamW(groups, betas=(0.9, BETA2))

    return make


def _decayed_last(model):
    groups = _halves("bias", "LayerNorm.weight", decay=0.1)(model).param_groups
    return AdamW(
        [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in groups[::-1]],
        betas=(0.9, BETA2),
    )


def _by_axes(model):
    parameters = list(model.parameters())
    groups = [[p for p in parameters if (p.dim() >= 2) is big] for big in (True, False)]
    return AdamW([{"params": group} for group in groups], betas=(0.9, BETA2))


@pytest.mark.parametrize(
    ("family", "make"),
    [
        ("bert", _one_group),
        ("gpt2", _one_group),
        ("bert", _named),
        ("gpt2", _named),
        ("llama", _amsgrad),
        ("bert", _halves("bias", "LayerNorm.weight", decay=0.01)),
        ("gpt2", _halves("bias", "LayerNorm.weight", decay=0.01)),
        ("llama", _halves("bias", decay=0.01)),
        ("bert", _decayed_last),
        ("gpt2", _by_axes),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_loop_of_one_s_own(family: str, make, tmp_path: Path) -> None:
    model = load(save_model(tmp_path / "start", family), family)
    oracle = loop(model, family, tmp_path / "end", make)
    found = values(taken(tmp_path / "end"))
    assert_close(found, oracle.in_files(model, tmp_path / "oracle"), **CLOSE)


def test_one_step_is_the_squared_gradient(tmp_path: Path) -> None:
    model = load(save_model(tmp_path / "start"), "bert")
    loop(model, "bert", tmp_path / "end", _one_group, steps=1)
    found = values(taken(tmp_path / "end"))
    expected = {name: p.grad.square() for name, p in model.named_parameters()}
    assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("by_name", [True, False], ids=["names", "numbers"])
def test_frozen_parameters_are_named_with_a_reason_and_a_warning(
    by_name: bool, tmp_path: Path, caplog
) -> None:
    model = load(save_model(tmp_path / "start"), "bert")
    frozen = {n for n, _ in model.named_parameters() if "embeddings" in n or "pooler" in n}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)

    def make(model):
        given = model.named_parameters() if by_name else model.parameters()
        return AdamW(list(given), betas=(0.9, BETA2))

    oracle = loop(model, "bert", tmp_path / "end", make)
    sidecar = taken(tmp_path / "end")
    correction = 1 - BETA2**4
    expected = {name: value / correction for name, value in oracle.values.items()}
    assert_close(values(sidecar), expected, **CLOSE)
    assert sidecar.measurement.unmeasured.keys() == frozen
    assert all("no state" in why for why in sidecar.measurement.unmeasured.values())
    assert f"no state of {len(frozen)} tensors" in caplog.text


def test_the_header_says_what_is_known(tmp_path: Path) -> None:
    model = load(save_model(tmp_path / "start"), "bert")
    train(model, "bert", tmp_path / "run", weight_decay=0.1)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    measurement = taken(checkpoint).measurement
    settings, origin = measurement.settings, measurement.calibration
    assert (settings.estimator, settings.unit) == ("adam", "batch")
    assert settings.likelihood == "categorical"
    assert settings.examples is settings.tokens is settings.max_length is settings.seed is None
    assert origin["optimizer"] == str(checkpoint)
    assert (origin["steps"], origin["betas"], origin["eps"]) == (2, [0.9, BETA2], 1e-8)
    assert (origin["weight_decay"], origin["batch_size_per_device"]) == ([0.1, 0.0], 4)
    assert len(origin["data"]) == 32


def test_bfloat16_on_request(tmp_path: Path) -> None:
    model = load(save_model(tmp_path / "start"), "bert")
    loop(model, "bert", tmp_path / "end", _one_group)
    exact = {n: v.bfloat16() for n, v in values(taken(tmp_path / "end")).items()}
    short = values(taken(tmp_path / "end", sidecar_dtype="bfloat16"))
    assert all(torch.equal(short[name], value) for name, value in exact.items())
