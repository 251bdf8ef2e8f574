"""What the factors of a sidecar say of a model's layers: how large, and in how many directions.

A factor A is symmetric and positive semidefinite. Its *effective rank* (tr A)² / ‖A‖² lies between
1, where all its rows point one way, and its width, where it is a multiple of the identity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_mergekit.sidecar.reader import Sidecar

ROWS = 1 << 22
"""Elements that are squared in float64 at once."""


@dataclass(frozen=True)
class Factor:
    """One stored factor, or one an expert.

    Attributes:
        name: of the stored tensor.
        role: `inputs` or `outputs`.
        diagonal: float64 `[blocks, width]`; one block, or one an expert.
        squares: the sum of squares of each block's elements, float64 `[blocks]`.
        is_matrix: whether all of it is stored, or its diagonal only.
        weights: names of the weights that it describes.
    """

    name: str
    role: str
    diagonal: Tensor
    squares: Tensor
    is_matrix: bool
    weights: tuple[str, ...]

    @property
    def width(self) -> int:
        """Number of inputs, or of outputs."""
        return self.diagonal.shape[-1]

    @property
    def mean(self) -> float:
        """The mean of the diagonal."""
        return float(self.diagonal.mean())

    @property
    def effective_rank(self) -> float:
        """(tr A)² / ‖A‖², the mean of it over the blocks that are not zero; 0 if all are."""
        some = self.squares > 0
        ranks = self.diagonal.sum(-1)[some].square() / self.squares[some]
        return float(ranks.mean()) if len(ranks) else 0.0

    @property
    def off_diagonal(self) -> float | None:
        """The share of the squares that stands off the diagonal; None if only that is stored."""
        if not self.is_matrix:
            return None
        whole = float(self.squares.sum())
        return max(0.0, 1 - float(self.diagonal.square().sum()) / whole) if whole else 0.0


def read_factors(sidecar: Sidecar) -> dict[str, Factor]:
    """Return every stored factor by its name; none of a kind that has no factors.

    Reads each tensor once, and keeps its diagonal only.

    Raises:
        SidecarError: a tensor is corrupt.
    """
    measurement = sidecar.measurement
    weights: dict[tuple[str, str], list[str]] = {}
    for weight, record in measurement.factors.items():
        weights.setdefault((record.inputs, "inputs"), []).append(weight)
        if record.outputs is not None:
            weights.setdefault((record.outputs, "outputs"), []).append(weight)
    found = {}
    for (name, role), described in weights.items():
        lead = len(measurement.weights[described[0]].shape) - 2
        stored = sidecar.load(name)
        is_matrix = stored.dim() == lead + 2
        blocks = stored.reshape(-1, *stored.shape[lead:])
        diagonal = (blocks.diagonal(dim1=-2, dim2=-1) if is_matrix else blocks).double().clone()
        squares = torch.stack([_square(block) for block in blocks])
        found[name] = Factor(name, role, diagonal, squares, is_matrix, tuple(described))
    return found


def _square(block: Tensor) -> Tensor:
    return torch.stack([x.double().square().sum() for x in block.reshape(-1).split(ROWS)]).sum()
