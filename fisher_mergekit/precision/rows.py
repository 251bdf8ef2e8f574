r"""Rows of a matrix that not every model has, such as a head's rows of tokens.

A model that lacks a row knows nothing of it: Cᵢ = diag(presentᵢ) ⊗ Aᵢ, with presentᵢ of ones and
zeros. The rows fall into groups by which models have them, and within a group the equation is that
of the kind, with a zero in place of the Gram of each model that is not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fisher_mergekit.precision import equation, kind_for
from fisher_mergekit.precision.diagonal import counting

ABSENT = -1
"""In place of the number of a model's row: it has none."""


def taken(tensor: Tensor, rows: Tensor, axes: Sequence[int]) -> Tensor:
    """Return a tensor's own slices in another order, and zero where there is none.

    Args:
        tensor: what was measured; borrowed.
        rows: `[v]`, for each new index the old one, or `ABSENT`.
        axes: along which the indices run.
    """
    rows = rows.to(tensor.device)
    lacking = (rows < 0).nonzero().squeeze(-1)
    for axis in axes:
        tensor = tensor.index_select(axis, rows.clamp(min=0)).index_fill_(axis, lacking, 0)
    return tensor


def groups(present: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Group rows by which models have them.

    Args:
        present: one a model, `[v]` booleans.

    Returns:
        The groups `[n, g]`, whether each model is there, and each row's group `[v]`.
    """
    found: tuple[Tensor, Tensor] = torch.unique(
        torch.stack(list(present)), dim=1, return_inverse=True
    )
    return found


def uncoupled(factor: Tensor, present: Sequence[Tensor]) -> Tensor:
    """Return a factor `[v, v]` without what couples rows of one group with rows of another.

    A model that has a row others lack would otherwise bend it, to make up for where the merge
    leaves the model in the rows that all have.
    """
    _, group = groups(present)
    group = group.to(factor.device)
    return factor * (group.unsqueeze(0) == group.unsqueeze(1))


def solve(
    kind: str,
    thetas: Sequence[Tensor],
    inputs: Sequence[Tensor],
    lambdas: Sequence[float],
    present: Sequence[Tensor],
    *,
    shared: object = None,
    name: str = "",
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Tensor:
    """Return the merged matrix, for precisions diag(presentᵢ) ⊗ Aᵢ.

    Args:
        kind: one that takes a Gram alone.
        thetas: n matrices `[o, i]`; borrowed.
        inputs: n Grams Aᵢ, `[i, i]` or the diagonal `[i, 1]`.
        lambdas: n, not all zero.
        present: n times `[o]` booleans.
        shared: what the kind's `common` gives for these inputs, if it is there already.
        name: the tensor's, for the log.
        dtype: the result's, as in `equation.solve`.
        options: the kind's own.

    Returns:
        A new tensor. In a row that no model has, the mean.
    """
    there, group = groups([present[i].cpu() for i in counting(lambdas)])
    number = {model: index for index, model in enumerate(counting(lambdas))}
    result: Tensor | None = None
    for index, has in enumerate(there.unbind(1)):
        own = [
            (a,) if i in number and has[number[i]] else (a.new_zeros(a.shape[-2], 1),)
            for i, a in enumerate(inputs)
        ]
        more = {**options, "shared": shared} if shared is not None and has.all() else options
        system = kind_for(kind).system(own, lambdas, **more)
        if there.shape[1] == 1:
            return equation.solve(system, thetas, lambdas, name=name, dtype=dtype)
        rows = (group == index).nonzero().squeeze(-1).to(thetas[0].device)
        own_thetas = [theta.index_select(-2, rows) for theta in thetas]
        part = equation.solve(system, own_thetas, lambdas, name=name, dtype=dtype)
        if result is None:
            result = part.new_empty(thetas[0].shape)
        result.index_copy_(-2, rows, part)
    assert result is not None
    return result
