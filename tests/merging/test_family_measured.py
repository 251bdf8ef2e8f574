"""The whole way: `precompute RECIPE`, then the same recipe to mergekit, for both methods."""

import dense_oracle
import pytest
import tiny
import torch
import yaml
from factors import Described, scale
from models import read
from precomputing import succeed, write_recipe
from running import merged

from fisher_mergekit.sidecar.reader import Sidecar

pytestmark = pytest.mark.slow  # exhaustive: not needed at every change


def described(folder, kind):
    sidecar = Sidecar(folder / "sidecar", kind)
    stored = {name: sidecar.load(name).clone() for name in sidecar}
    return Described(folder, kind, read(folder), dict(sidecar.measurement.factors), stored)


@pytest.mark.parametrize(("kind", "method"), [("gram", "regmean"), ("kfac", "mats")])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_measured_and_merged(tmp_path, kind, method, family):
    options = {"num_labels": 3} if family == "bert" else {}
    folders = [
        tiny.save_model(tmp_path / name, family, seed=seed, **options)
        for seed, name in enumerate("ab")
    ]
    data = tiny.write_rows(tmp_path / "data.jsonl")
    calibration = {"path": str(data), "text": "text"}
    parameters = {"embeddings": True, "others": "mean"}
    if kind == "kfac":
        parameters["tolerance"] = 1e-9
    path = write_recipe(
        tmp_path, *folders, calibration=calibration, merge_method=method, parameters=parameters
    )
    succeed(path)
    found = merged(yaml.safe_load(path.read_text()), tmp_path / "out")
    models = [described(folder, kind) for folder in folders]
    first = models[0]
    matrices = {n for n, t in first.thetas.items() if t.ndim == 2 and "classifier" not in n}
    assert matrices <= set(first.factors)
    scales = [1.0, 1.0] if kind == "gram" else [scale(made, first.factors) for made in models]
    told_apart = 0
    for name, theta in first.thetas.items():
        average = (theta.double() + models[1].thetas[name].double()) / 2
        if name not in first.factors:
            torch.testing.assert_close(found[name].double(), average, rtol=1e-5, atol=1e-5)
            continue
        turn = first.factors[name].input_axis == -2
        result, average = (x.double().mT if turn else x.double() for x in (found[name], average))
        moved = gaps = 0.0
        sizes = 0.0
        for made, size in zip(models, scales, strict=True):
            a, b = factors(made, name)
            moved += b @ (made.matrix(name) - average) @ a / size
            gaps += b @ (made.matrix(name) - result) @ a / size
            sizes += b.diag()[:, None] * a.diag() / size
        unit = sizes.clamp_min(1e-300).sqrt()  # as large as what is known there
        rounding = 1e-6 * (average * unit).norm()
        assert (gaps / unit).norm() <= 1e-4 * (moved / unit).norm() + rounding, name
        told_apart += bool((moved / unit).norm() > 1e3 * rounding)
    assert told_apart > len(first.factors) / 2  # they are not all the mean


def factors(made, name):
    """Return the factors of a weight as the merge takes them, the outputs' too."""
    stored = map(dense_oracle.as_matrix, made.precision(name))
    inputs, *outputs = (dense_oracle.shrunk(factor, 0.9) for factor in stored)
    return inputs, *(outputs or [torch.eye(len(made.matrix(name))).double()])
