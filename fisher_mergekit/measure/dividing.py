"""Factors of a parameter in memory, as factors of the tensors in the files that it was made of.

Most are the same tensor. Of packed experts each is a tensor of its own in the files, with the
expert's own factors; of a fused projection each has the input factor of all of it, and a block of
its output factor. Which rows and columns a tensor has is read off element numbers that take the way
back to the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_mergekit.sidecar.layout import Group


@dataclass(frozen=True)
class Part:
    """Where a tensor in the files has its rows and columns from.

    Attributes:
        source: its name in the files.
        target: name of the parameter in memory, `[…, a, b]`.
        experts: for each leading entry of the source, which one of the target's it is; None if
            source and target are the same tensor.
        rows: along its last axis but one, which of the target's a; or, transposed, b.
        columns: along its last axis.
        is_transposed: whether rows come from b, and columns from a.
        leads: whether the source has a leading axis of experts too.
    """

    source: str
    target: str
    experts: tuple[int, ...] | None = None
    rows: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()
    is_transposed: bool = False
    leads: bool = False

    def axis(self, of_target: int) -> int:
        """Return the axis that the target's axis -1 or -2 became."""
        return -3 - of_target if self.is_transposed else of_target

    def indices(self, of_target: int) -> tuple[int, ...]:
        """Return which of the target's entries along an axis it has."""
        return self.columns if self.axis(of_target) == -1 else self.rows

    def of(self, factor: Tensor, of_target: int, *, is_matrix: bool) -> Tensor:
        """Return its part of the target's factor along an axis, -1 or -2."""
        if self.experts is None:
            return factor
        experts = factor if factor.dim() > 1 + is_matrix else factor[None]
        indices = self.indices(of_target)
        if indices == tuple(range(factor.shape[-1])):
            found = [experts[e] for e in self.experts]
        else:
            index = torch.tensor(indices, device=factor.device)
            found = [experts[e].index_select(0, index) for e in self.experts]
            found = [x.index_select(1, index) for x in found] if is_matrix else found
        return torch.stack(found) if self.leads else found[0].clone()


def divided(group: Group) -> list[Part]:
    """Return the parts of everything that a group was made of.

    Raises:
        ValueError: a tensor of the files is no block of rows and columns of one parameter; the
            message is half a sentence on it.
    """
    if group.is_plain:
        return [Part(group.sources[0].name, next(iter(group.targets)))]
    numbers: dict[str, Tensor] = {}
    starts: dict[str, int] = {}
    total = 0
    dtype = torch.int32 if sum(s.count for s in group.sources) < 2**31 else torch.int64
    for name, shape in group.targets.items():
        starts[name] = total
        count = torch.Size(shape).numel()
        numbers[name] = torch.arange(total, total + count, dtype=dtype).view(shape)
        total += count
    return [_part(name, places, group.targets, starts) for name, places in group.restore(numbers)]


def _part(
    source: str,
    places: Tensor,
    targets: Mapping[str, tuple[int, ...]],
    starts: Mapping[str, int],
) -> Part:
    if places.dim() < 2:
        raise ValueError(f"{source} is no matrix")
    target = max((n for n in targets if starts[n] <= places.flatten()[0]), key=starts.__getitem__)
    *_, a, b = targets[target]
    experts = []
    ways = set()
    for matrix in places.reshape(-1, *places.shape[-2:]) - starts[target]:
        first_row, first_column, corner = matrix[0], matrix[:, 0], matrix[0, 0]
        if not torch.equal(matrix, first_column[:, None] + first_row - corner):
            raise ValueError(f"{source} is no block of {target}")
        # Of a row, or a column, alone only one of the two tells.
        is_transposed = bool(
            (first_row // b != corner // b).any() or (first_column % b != corner % b).any()
        )
        along_row, along_column = first_row % (a * b), first_column % (a * b)
        if is_transposed:
            columns, rows = along_row // b, along_column % b
        else:
            columns, rows = along_row % b, along_column // b
        experts.append(int(corner) // (a * b))
        ways.add((tuple(rows.tolist()), tuple(columns.tolist()), is_transposed))
    (rows_of, columns_of, is_transposed), *others = ways
    last = torch.tensor(experts[-1]) * a * b + a * b
    if others or places.max() - starts[target] >= last:
        raise ValueError(f"{source} is no block of {target}")
    leads = places.dim() > 2
    return Part(source, target, tuple(experts), rows_of, columns_of, is_transposed, leads)
