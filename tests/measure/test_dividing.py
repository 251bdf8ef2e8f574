"""Factors of a parameter in memory, as those of the tensors in the files: any way of moving rows.

the files' matrices -> moved into memory as a conversion would
rows x, gradients g -> the factors in memory
== the factors of what each of the files' matrices multiplies itself
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fisher_mergekit.measure.dividing import divided
from fisher_mergekit.sidecar.layout import Group


@dataclass
class Fusion:
    """Matrices of several experts, a tensor each in the files, in some parameters.

    Attributes:
        sizes: outputs of each of an expert's matrices, which stand above one another in memory.
        order: of the rows of all of them in memory.
        stays_packed: the files have all experts in one tensor too.
        targets: outputs of each parameter in memory, together as many.
    """

    experts: int
    width: int
    sizes: tuple[int, ...]
    order: tuple[int, ...]
    targets: tuple[int, ...]
    is_turned_in_files: bool
    is_turned_in_memory: bool
    stays_packed: bool

    def files(self, matrices: Tensor) -> dict[str, Tensor]:
        """Return the files' tensors of `[e, o, i]`, all outputs of an expert after each other."""
        found = {}
        for k, piece in enumerate(matrices.split(self.sizes, dim=1)):
            piece = piece.mT if self.is_turned_in_files else piece
            if self.stays_packed:
                found[f"all.w{k}"] = piece.clone()
            else:
                found |= {f"{e}.w{k}": of_expert.clone() for e, of_expert in enumerate(piece)}
        return found

    def memory(self, files: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what becomes of the files' tensors; one expert alone is no axis."""
        pieces = []
        for k in range(len(self.sizes)):
            named = [files[f"{e}.w{k}"] for e in range(self.experts) if f"{e}.w{k}" in files]
            piece = torch.stack(named) if named else files[f"all.w{k}"]
            pieces.append(piece.mT if self.is_turned_in_files else piece)
        whole = torch.cat(pieces, dim=1)[:, list(self.order)]
        targets = whole.split(self.targets, dim=1)
        targets = [t.mT if self.is_turned_in_memory else t for t in targets]
        targets = [t[0] if self.experts == 1 else t for t in targets]
        return {f"p{k}": t.contiguous() for k, t in enumerate(targets)}

    # What `Group` asks of a converter.

    def __deepcopy__(self, memo):
        return Collecting(self)


class Collecting:
    def __init__(self, fusion):
        self.fusion, self.tensors = fusion, {}

    def add_tensor(self, target, name, pattern, tensor):
        self.tensors[name] = tensor

    def convert(self, target, model=None, config=None):
        return self.fusion.memory(self.tensors)


def group_of(converter, files, memory) -> Group:
    sources = [SimpleNamespace(name=n, shape=t.shape, count=t.numel()) for n, t in files.items()]
    targets = {name: tuple(t.shape) for name, t in memory.items()}
    return Group(tuple(sources), targets, tuple(files), converter, None)


@st.composite
def fusions(draw) -> Fusion:
    sizes = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    total = sum(sizes)
    # Only one of many pieces and many targets: either fused, or dealt out.
    dealt = len(sizes) == 1 and draw(st.booleans())
    cuts = sorted(draw(st.sets(st.integers(1, total - 1)))) if dealt and total > 1 else []
    edges = [0, *cuts, total]
    return Fusion(
        experts=draw(st.integers(1, 3)),
        width=draw(st.integers(1, 4)),
        sizes=sizes,
        order=tuple(range(total)) if cuts else tuple(draw(st.permutations(range(total)))),
        targets=tuple(b - a for a, b in pairwise(edges)),
        is_turned_in_files=draw(st.booleans()),
        is_turned_in_memory=draw(st.booleans()),
        stays_packed=draw(st.booleans()),
    )


@settings(max_examples=300, deadline=None)
@given(fusion=fusions(), seed=st.integers(0, 99))
@pytest.mark.slow
def test_every_matrix_in_the_files_has_the_factors_of_what_it_multiplies(fusion, seed):
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    matrices = noise(fusion.experts, sum(fusion.sizes), fusion.width)
    files = fusion.files(matrices)
    memory = fusion.memory(files)
    x = noise(fusion.experts, 7, fusion.width)
    g = noise(fusion.experts, 7, sum(fusion.sizes))  # of the files' outputs
    inputs, axis = x.mT @ x, -2 if fusion.is_turned_in_memory else -1
    in_memory = g[:, :, list(fusion.order)].split(fusion.targets, dim=2)
    outputs = {f"p{k}": part.mT @ part for k, part in enumerate(in_memory)}
    if fusion.experts == 1:
        inputs, outputs = inputs[0], {name: total[0] for name, total in outputs.items()}
    try:
        parts = divided(group_of(fusion, files, memory))
    except ValueError:
        assert len(fusion.targets) > 1  # one tensor of several parameters has no factor of its own
        return
    assert sorted(part.source for part in parts) == sorted(files)
    for part in parts:
        expert, piece = part.source.split(".w")
        of_experts = slice(None) if expert == "all" else int(expert)
        start = sum(fusion.sizes[: int(piece)])
        own = g[of_experts][..., start : start + fusion.sizes[int(piece)]]
        found = part.of(inputs, axis, is_matrix=True)
        torch.testing.assert_close(found, (x.mT @ x)[of_experts])
        found = part.of(outputs[part.target], -3 - axis, is_matrix=True)
        torch.testing.assert_close(found, own.mT @ own)
        diagonal = part.of(
            outputs[part.target].diagonal(dim1=-2, dim2=-1), -3 - axis, is_matrix=False
        )
        torch.testing.assert_close(diagonal, own.square().sum(-2))
        if 1 not in files[part.source].shape:
            assert part.axis(axis) == (-2 if fusion.is_turned_in_files else -1)


class Scrambled(Fusion):
    """Every number arrives, and rows do not stay rows."""

    def memory(self, files):
        (tensor,) = files.values()
        return {"p0": tensor.reshape(-1).roll(1).view(tensor.shape)}


def test_what_does_not_keep_its_rows_is_not_described():
    scrambled = Scrambled(1, 4, (3,), (0, 1, 2), (3,), False, False, False)
    files = {"0.w0": torch.zeros(3, 4)}
    with pytest.raises(ValueError, match=r"0\.w0 is no block of p0"):
        divided(group_of(scrambled, files, {"p0": files["0.w0"]}))


def test_a_vector_is_not_described():
    fusion = Fusion(1, 4, (3,), (0, 1, 2), (3,), False, False, False)
    fusion.memory = lambda files: {"p0": torch.stack(list(files.values()))}
    files = {"0.bias": torch.zeros(4), "1.bias": torch.zeros(4)}
    memory = {"p0": torch.zeros(2, 4)}
    with pytest.raises(ValueError, match="is no matrix"):
        divided(group_of(fusion, files, memory))
