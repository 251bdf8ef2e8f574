"""Sidecars of factors: shared, of two shapes, and refused where they fit no weight."""

import pytest
import torch
from sidecars import rewrite_header, write_factors

from fisher_mergekit.errors import SidecarError
from fisher_mergekit.sidecar.header import (
    FactorNames,
)
from fisher_mergekit.sidecar.reader import Sidecar
from fisher_mergekit.sidecar.writer import describe

SHAPES = {
    "q.weight": (4, 6),
    "k.weight": (3, 6),
    "conv.weight": (6, 5),
    "table.weight": (9, 6),
    "experts.up": (2, 5, 6),
}
FACTORS = {
    "q.weight": FactorNames(inputs="k.weight.inputs", outputs="q.weight.outputs"),
    "k.weight": FactorNames(inputs="k.weight.inputs"),
    "conv.weight": FactorNames(inputs="conv.weight.inputs", input_axis=-2),
    "table.weight": FactorNames(inputs="table.weight.inputs", input_axis=-2),
    "experts.up": FactorNames(inputs="experts.up.inputs", outputs="experts.up.outputs"),
}
MATRICES = {
    "k.weight.inputs": (6, 6),
    "conv.weight.inputs": (6, 6),
    "experts.up.inputs": (2, 6, 6),
    "q.weight.outputs": (4, 4),
}
DIAGONALS = {"table.weight.inputs": (9,), "experts.up.outputs": (2, 5)}


def write(folder, kind="kfac", digest="d", factors=FACTORS, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    tensors = {n: torch.rand(shape, generator=generator) for n, shape in DIAGONALS.items()}
    for name, shape in MATRICES.items():
        rows = torch.rand(shape, generator=generator)
        tensors[name] = rows.mT @ rows
    write_factors(folder, tensors, factors, shapes, kind=kind, digest=digest)
    return tensors


def test_read_as_written(tmp_path):
    tensors = write(tmp_path)
    sidecar = Sidecar(tmp_path, "kfac")
    assert set(sidecar.weights) == set(SHAPES)
    assert sidecar.stored("q.weight") == ("k.weight.inputs", "q.weight.outputs")
    assert sidecar.stored("k.weight") == ("k.weight.inputs",)
    for name, tensor in tensors.items():
        assert torch.equal(sidecar.load(name), tensor)
        record = sidecar.measurement.tensors[name]
        assert (record.asymmetry is None) == (name in DIAGONALS)
        assert not record.asymmetry or record.asymmetry < 1e-6


def test_how_symmetric_a_matrix_is_stands_in_the_header():
    matrix = torch.tensor([[2.0, 1.0], [0.5, 4.0]])
    assert describe({"a": matrix}, ["a"])["a"].asymmetry == pytest.approx(0.125)
    assert describe({"a": matrix})["a"].asymmetry is None


@pytest.mark.parametrize(
    ("weight", "change", "phrase"),
    [
        ("q.weight", {"input_axis": -2}, "k.weight.inputs has shape [6, 6], but its weight [4, 6]"),
        ("q.weight", {"inputs": "q.weight.outputs"}, "has shape [4, 4], but its weight [4, 6] has"),
        ("k.weight", {"inputs": "nothing"}, "nothing is missing"),
        ("table.weight", {"inputs": "conv.weight.inputs"}, "has 9 inputs"),
        ("conv.weight", {"inputs": "k.weight.inputs"}, "no weight is described by conv.weight.inp"),
        ("experts.up", {"outputs": "q.weight.outputs"}, "[2, 5, 6] has 5 outputs"),
    ],
)
def test_factors_that_fit_no_weight(tmp_path, weight, change, phrase):
    write(tmp_path)
    rewrite_header(tmp_path, lambda c: c["kinds"]["kfac"]["factors"][weight].update(change))
    with pytest.raises(SidecarError) as error:
        Sidecar(tmp_path, "kfac")
    assert phrase in error.value.message


def test_kinds_of_the_same_weights_stay_though_they_describe_other_ones(tmp_path):
    write(tmp_path, "gram")
    write(tmp_path, "kfac", shapes=SHAPES | {"bias": (4,)})
    assert Sidecar(tmp_path, "gram").weights == FACTORS.keys()
    assert Sidecar(tmp_path, "kfac").weights == FACTORS.keys()
    write(tmp_path, "kfac", digest="of other weights")
    with pytest.raises(SidecarError, match="has no complete 'gram'"):
        Sidecar(tmp_path, "gram")
