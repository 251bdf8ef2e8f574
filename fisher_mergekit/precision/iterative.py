"""Conjugate gradients: S x = b for an S that can be applied but not written down.

Hestenes & Stiefel 1952 (J. Res. Natl. Bur. Stand. 49, 409), preconditioned. S is symmetric positive
semidefinite and b in its range; then all steps stay in the range of the preconditioned S, and
directions in which S is zero are never taken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

LOG = logging.getLogger(__name__)

_OFTEN = 100
"""Iterations between two lines in the log."""


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    precondition: Callable[[Tensor], Tensor],
    right: Tensor,
    *,
    tolerance: float,
    iterations: int,
    name: str = "",
) -> Tensor:
    """Return x with S x = b, to a relative residual of `tolerance`.

    The residual is measured with the preconditioner, √(rᵀ P⁻¹ r / bᵀ P⁻¹ b): an error in a
    direction counts by what the models know of it.

    Args:
        apply: S, a function of tensors shaped like b.
        precondition: P⁻¹ likewise, symmetric positive semidefinite.
        right: b, `[…, o, i]`; each of the leading axes is a system of its own.
        tolerance: where to stop.
        iterations: at most so many; a warning says if they were not enough.
        name: of what is solved, for the log.
    """
    found = torch.zeros_like(right)
    rest = right.clone()
    step = precondition(rest)
    size = _dot(rest, step)
    first = size.clone()
    done = 0
    while True:
        open_ = size > first * tolerance**2
        finished = not open_.any()
        if finished or done == iterations:
            break
        image = apply(step)
        curvature = _dot(step, image)
        going = open_ & (curvature > 0)
        if not going.any():
            break  # rounding is all that is left
        length = torch.where(going, size / torch.where(going, curvature, 1.0), 0.0)
        found.addcmul_(length, step)
        rest.addcmul_(-length, image)
        ahead = precondition(rest)
        before, size = size, torch.where(going, _dot(rest, ahead), size)
        turn = torch.where(going, size / torch.where(going, before, 1.0), 0.0)
        step = ahead.addcmul_(turn, step)
        done += 1
        if done % _OFTEN == 0:
            LOG.info("%s: %d iterations, residual %.1e", name, done, _relative(size, first))
    reached = _relative(size, first)
    LOG.info("%s: solved in %d iterations to a residual of %.1e", name, done, reached)
    if not finished:
        LOG.warning(
            "%s: the solution has a residual of %.1e after %d iterations, not the tolerance of "
            "%.1e. Allow more `iterations`, or a larger `tolerance`.",
            name,
            reached,
            done,
            tolerance,
        )
    return found


def _dot(one: Tensor, two: Tensor) -> Tensor:
    return (one * two).sum((-2, -1), keepdim=True)


def _relative(size: Tensor, first: Tensor) -> float:
    ratio = size.clamp_min(0) / torch.where(first > 0, first, 1.0)
    return float(ratio.max().sqrt()) if ratio.numel() else 0.0
