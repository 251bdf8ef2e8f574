"""Models and data that the commands are tried on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
from precomputing import flags, succeed
from tiny import write_rows


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
