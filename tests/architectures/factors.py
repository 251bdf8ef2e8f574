"""Factors in a model's sidecar, against what its matrices multiply in plain PyTorch, in float64.

    every tensor in the files
    == some rows or columns of a matrix in memory, which is found *by its values*
    -> its stored factors == those of that very matrix in `factor_oracle`

So which name in the files is which matrix, how packed experts are cut and fused projections dealt
out is asked of nobody.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import factor_oracle
import torch
from models import read
from torch import Tensor, nn

from fisher_mergekit.measure.batches import Example
from fisher_mergekit.measure.likelihoods import likelihood_for
from fisher_mergekit.sidecar.reader import Sidecar

NOTHING = 1e-11
"""An output factor that is so much smaller than the largest is one of gradients that are zero."""


@dataclass
class Found:
    """What was found of a model's factors.

    Attributes:
        error: the worst relative error of a stored factor.
        undescribed: matrices in the files that multiply something, and have no factors.
        tables: tables in the files that are looked up, and have no factors.
    """

    error: float = 0.0
    undescribed: set[str] = field(default_factory=set)
    tables: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Place:
    """Where a matrix in the files stands in memory: as some rows of a matrix, or its transpose's.

    Attributes:
        name: of the parameter.
        expert: which of its matrices; None if it has but one.
        rows: which of its rows, in the order of the files.
        is_transposed: whether the matrix in the files has the parameter's columns for rows.
    """

    name: str
    expert: int | None
    rows: Tensor
    is_transposed: bool


def compare(model: nn.Module, folder: Path, examples: Sequence[Example]) -> Found:
    """Compare gram and kfac of a model's own sidecar with the oracle; return how well they agree.

    Args:
        model: as transformers loads it from the folder.
    """
    places = dict(_places(model, read(folder)))
    likelihood = likelihood_for(type(model).__name__, model.config)
    exact = likelihood.default_estimator == "exact"
    model = model.double().requires_grad_(True)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the others know no float64
    outcomes = factor_oracle.classes if exact else factor_oracle.drawn_by(likelihood)
    oracle = factor_oracle.measure(model, examples, outcomes)
    gram, kfac = (Sidecar(folder / "sidecar", kind) for kind in ("gram", "kfac"))
    assert set(gram.weights) == set(kfac.weights)
    largest = max(float(total.norm()) for total in oracle.outputs.values())
    found = Found()

    def check(sidecar: Sidecar, name: str, expected: Tensor, nothing: float = 0.0) -> None:
        stored = sidecar.load(name).double()
        assert stored.shape == expected.shape, (name, stored.shape, expected.shape)
        assert stored.dim() < 2 or torch.equal(stored, stored.mT), name
        error = float((stored - expected).norm())
        if expected.norm() <= nothing:
            assert error <= 10 * nothing, name
        elif error:
            found.error = max(found.error, error / float(expected.norm()))

    for weight, own in places.items():
        matrix = own[0].name
        if weight not in gram.weights:
            if matrix in oracle.inputs:
                found.undescribed.add(weight)
            elif matrix in oracle.lookups:
                found.tables.add(weight)
            continue
        record = kfac.measurement.factors[weight]
        (of_gram,) = gram.stored(weight)
        if matrix not in oracle.inputs:
            counts = oracle.lookups[matrix]
            assert record.input_axis == -2
            check(gram, of_gram, counts / len(examples))
            check(kfac, record.inputs, counts / counts.sum())
            continue
        axis = oracle.axes[matrix]
        assert record.input_axis == (-3 - axis if own[0].is_transposed else axis), weight
        cut = record.input_axis == -2  # the files' rows are inputs, not outputs
        inputs = _stacked([_of(oracle.inputs, p, cut=cut) for p in own])
        rows = _stacked([_of(oracle.rows, p, cut=False).clamp_min(1) for p in own])
        check(gram, of_gram, inputs / len(examples))
        check(kfac, record.inputs, inputs / rows.reshape(*rows.shape, *[1] * 2))
        outputs = _stacked([_of(oracle.outputs, p, cut=not cut) for p in own]) / len(examples)
        assert record.outputs is not None
        check(kfac, record.outputs, outputs, NOTHING * largest)
    return found


def assert_same_alone(folder: Path, alone: Path) -> None:
    """Assert that a gram that was measured alone is that of all kinds together."""
    gram, again = Sidecar(folder / "sidecar", "gram"), Sidecar(alone, "gram")
    assert set(again.weights) == set(gram.weights)
    for weight in gram.weights:
        (one,), (other,) = gram.stored(weight), again.stored(weight)
        one, other = gram.load(one), again.load(other)
        assert (one - other).norm() <= 1e-5 * one.norm(), weight


def _of(factors: factor_oracle.Factors, place: Place, *, cut: bool) -> Tensor:
    """Return the factor of a matrix; `cut` takes its rows' part."""
    factor = factors[place.name]
    factor = factor if place.expert is None else factor[place.expert]
    return factor[place.rows][:, place.rows] if cut else factor


def _stacked(factors: list[Tensor | None]) -> Tensor:
    return factors[0] if len(factors) == 1 else torch.stack(factors)


def _places(model: nn.Module, files: dict[str, Tensor]) -> Iterator[tuple[str, list[Place]]]:
    """Yield the files' matrices, and where each stands in memory; of packed experts, all do."""
    held = [
        (name, expert if p.dim() == 3 else None, matrix)
        for name, p in model.named_parameters()
        for expert, matrix in enumerate(p.detach() if p.dim() == 3 else [p.detach()])
        if p.dim() in (2, 3)
    ]
    tables = {}
    for name, expert, matrix in held:
        for is_transposed in (False, True):
            for row, values in enumerate(matrix.T if is_transposed else matrix):
                key = values.contiguous().numpy().tobytes()
                tables.setdefault(key, (name, expert, is_transposed, row))
    for name, tensor in files.items():
        if tensor.dim() not in (2, 3) or not tensor.is_floating_point():
            continue
        places = [_place(m, tables) for m in (tensor if tensor.dim() == 3 else [tensor])]
        if all(place is not None for place in places):
            yield name, places


def _place(matrix: Tensor, tables: dict[bytes, tuple]) -> Place | None:
    rows = [tables.get(row.contiguous().numpy().tobytes()) for row in matrix]
    if None in rows:
        return None
    ((name, expert, is_transposed),) = {row[:3] for row in rows}
    return Place(name, expert, torch.tensor([row[3] for row in rows]), is_transposed)
