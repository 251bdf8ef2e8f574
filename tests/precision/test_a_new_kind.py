"""A kind is one file: what it needs is measured and stored, and its equation is solved."""

from __future__ import annotations

import sys

import pytest
import torch
from tiny import save_model, write_rows

from fisher_mergekit import precision
from fisher_mergekit.measure.job import Job
from fisher_mergekit.measure.precompute import precompute, prepare
from fisher_mergekit.recipe import Calibration
from fisher_mergekit.sidecar.reader import Sidecar

FILE = '''
"""How large each input is, whatever it goes together with."""

from fisher_mergekit.precision import gram
from fisher_mergekit.precision.statistics import Statistics

STATISTICS = Statistics(inputs="rows")


def system(precisions, lambdas):
    return gram.system(precisions, lambdas, offdiagonal=0.0)
'''


@pytest.fixture
def kind(tmp_path, monkeypatch):
    (tmp_path / "loudness.py").write_text(FILE)
    monkeypatch.setattr(precision, "__path__", [*precision.__path__, str(tmp_path)])
    yield "loudness"
    del sys.modules[f"{precision.__name__}.loudness"]


def test_it_is_measured_stored_and_merged_by(kind, tmp_path):
    model, data = save_model(tmp_path / "model"), write_rows(tmp_path / "data.jsonl")
    job = Job(
        reference=str(model), revision=None, folder=model, tokenizer=model,
        present=(model / "sidecar",), out=model / "sidecar", kinds=("kfac", kind),
        calibration=Calibration(path=str(data), text="text"),
    )  # fmt: skip
    header = precompute(prepare(job))
    assert set(header.kinds) == set(job.kinds)
    found, kfac = (Sidecar(model / "sidecar", name) for name in (kind, "kfac"))
    assert set(found.weights) == set(kfac.weights)
    weight = "bert.encoder.layer.0.intermediate.dense.weight"
    (name,) = found.stored(weight)
    assert torch.equal(found.load(name), kfac.load(kfac.stored(weight)[0]))

    sizes = found.load(name).diagonal()
    other = sizes.flip(0)
    thetas = torch.randn(2, 3, len(sizes))
    merged = precision.solve(kind, thetas, [(found.load(name),), (torch.diag(other),)], [1.0, 2.0])
    expected = (sizes * thetas[0] + 2 * other * thetas[1]) / (sizes + 2 * other)
    torch.testing.assert_close(merged.float(), expected)
