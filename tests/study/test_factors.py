"""The mass of what factors describe is that of the dense Kronecker product; ranks by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sidecars import write_factors
from torch import Tensor

from fisher_mergekit.sidecar.header import FactorNames
from fisher_mergekit.sidecar.reader import Sidecar
from fisher_mergekit.study.factors import read_factors
from fisher_mergekit.study.mass import factor_masses

Q, K = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"
UP = "model.layers.1.mlp.experts.up_proj"
CONV = "transformer.h.1.mlp.c_fc.weight"
EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

SHAPES = {Q: (4, 6), K: (3, 6), UP: (2, 5, 6), CONV: (6, 5), EMBED: (9, 6), HEAD: (9, 6)}
FACTORS = {
    Q: FactorNames(inputs=f"{Q}.inputs", outputs=f"{Q}.outputs"),
    K: FactorNames(inputs=f"{Q}.inputs", outputs=f"{K}.outputs"),
    UP: FactorNames(inputs=f"{UP}.inputs", outputs=f"{UP}.outputs"),
    CONV: FactorNames(inputs=f"{CONV}.inputs", input_axis=-2),
    EMBED: FactorNames(inputs=f"{EMBED}.inputs", input_axis=-2),
    HEAD: FactorNames(inputs=f"{HEAD}.inputs", outputs=f"{HEAD}.outputs"),
}
STORED = {
    f"{Q}.inputs": (6, 6), f"{Q}.outputs": (4, 4), f"{K}.outputs": (3, 3),
    f"{UP}.inputs": (2, 6, 6), f"{UP}.outputs": (2, 5, 5), f"{CONV}.inputs": (6, 6),
    f"{EMBED}.inputs": (9,), f"{HEAD}.inputs": (6, 6), f"{HEAD}.outputs": (9,),
}  # fmt: skip


def made_up() -> dict[str, Tensor]:
    """Return squares of random matrices; of `EMBED` and the head's outputs, a diagonal."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in STORED.items():
        rows = torch.randn(shape, generator=generator)
        is_diagonal = len(shape) == 1
        tensors[name] = rows.square() if is_diagonal else rows.mT @ rows
    return tensors


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return made_up()


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory, tensors) -> Sidecar:
    return Sidecar(write_factors(tmp_path_factory.mktemp("f"), tensors, FACTORS, SHAPES), "kfac")


def dense_diagonals(weight: str, tensors: dict[str, Tensor]) -> Tensor:
    """Return the diagonal of outputs ⊗ inputs, from the whole matrix of every expert."""
    record, shape = FACTORS[weight], SHAPES[weight]
    count = shape[-2] if record.input_axis == -1 else shape[-1]

    def matrices(name: str | None) -> Tensor:
        if name is None:
            return torch.eye(count, dtype=torch.float64)[None]
        stored = tensors[name].double()
        whole = torch.diag_embed(stored) if stored.dim() == len(shape) - 1 else stored
        return whole.reshape(-1, *whole.shape[-2:])

    pairs = zip(matrices(record.outputs), matrices(record.inputs), strict=True)
    return torch.cat([torch.kron(outputs, inputs).diagonal() for outputs, inputs in pairs])


@pytest.mark.parametrize("weight", FACTORS)
def test_the_mass_of_a_weight_is_that_of_the_dense_product(
    weight: str, sidecar: Sidecar, tensors
) -> None:
    found = {m.name: m for m in factor_masses(sidecar, read_factors(sidecar))}[weight]
    diagonal = dense_diagonals(weight, tensors)
    assert found.count == len(diagonal) == torch.tensor(SHAPES[weight]).prod()
    assert found.total == pytest.approx(float(diagonal.sum()))
    assert found.sum_of_squares == pytest.approx(float(diagonal.square().sum()))


def test_embeddings_come_first_then_layers_then_the_head(sidecar: Sidecar) -> None:
    order = [m.name for m in factor_masses(sidecar, read_factors(sidecar))]
    assert order == [EMBED, K, Q, UP, CONV, HEAD]


def test_a_shared_factor_knows_its_weights(sidecar: Sidecar) -> None:
    factors = read_factors(sidecar)
    assert sorted(factors[f"{Q}.inputs"].weights) == [K, Q]
    assert factors.keys() == STORED.keys()


@pytest.mark.parametrize("name", STORED)
def test_rank_and_off_diagonal_are_those_of_the_matrix(
    name: str, sidecar: Sidecar, tensors
) -> None:
    factor, stored = read_factors(sidecar)[name], tensors[name].double()
    if stored.dim() == 1:
        assert factor.off_diagonal is None
        stored = stored.diag()
    blocks = stored.reshape(-1, *stored.shape[-2:])
    ranks = [float(m.trace() ** 2 / (m @ m).trace()) for m in blocks]
    assert factor.effective_rank == pytest.approx(sum(ranks) / len(ranks))
    assert factor.width == blocks.shape[-1]
    traces = [float(m.trace()) for m in blocks]
    assert factor.mean == pytest.approx(sum(traces) / len(ranks) / factor.width)
    if factor.off_diagonal is not None:
        outside = sum(float((m - m.diag().diag()).square().sum()) for m in blocks)
        assert factor.off_diagonal == pytest.approx(outside / float(blocks.square().sum()))


def one(tmp_path: Path, matrix: Tensor):
    shapes = {Q: (4, *matrix.shape[-1:])}
    folder = write_factors(
        tmp_path, {"x": matrix}, {Q: FactorNames(inputs="x")}, shapes, kind="gram"
    )
    return read_factors(Sidecar(folder, "gram"))["x"]


def test_one_direction_has_rank_one(tmp_path: Path) -> None:
    row = torch.tensor([[1.0, -2.0, 3.0]])
    factor = one(tmp_path, row.mT @ row)
    assert factor.effective_rank == pytest.approx(1)
    assert factor.off_diagonal == pytest.approx(1 - (1 + 16 + 81) / 14**2)


def test_the_identity_has_full_rank_and_nothing_off_its_diagonal(tmp_path: Path) -> None:
    factor = one(tmp_path, 7 * torch.eye(3))
    assert factor.effective_rank == pytest.approx(3)
    assert factor.off_diagonal == 0


def test_zeros_have_no_rank_and_no_nonsense(tmp_path: Path) -> None:
    factor = one(tmp_path, torch.zeros(3, 3))
    assert (factor.effective_rank, factor.off_diagonal, factor.mean) == (0, 0, 0)


def test_experts_that_saw_nothing_do_not_count_towards_the_rank(tmp_path: Path) -> None:
    matrices = torch.stack([torch.eye(6), torch.zeros(6, 6)])
    folder = write_factors(
        tmp_path, {"x": matrices}, {UP: FactorNames(inputs="x")}, {UP: (2, 5, 6)}, kind="gram"
    )
    assert read_factors(Sidecar(folder, "gram"))["x"].effective_rank == pytest.approx(6)


def test_a_fisher_has_no_factors(tmp_path: Path) -> None:
    from sidecars import write

    assert read_factors(Sidecar(write(tmp_path), "fisher")) == {}
