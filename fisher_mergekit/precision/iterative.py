"""Conjugate gradients: S x = b for an S that can be applied but not written down.

Hestenes & Stiefel 1952 (J. Res. Natl. Bur. Stand. 49, 409), preconditioned. S is symmetric positive
semidefinite and b in its range; directions in which S is zero are never taken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

LOG = logging.getLogger(__name__)

_OFTEN = 100
"""Iterations between two lines in the log."""
_MADE_UP = 0.03
"""Share of the noise that a step through many directions has of it.

The noise is a bound for each direction by itself, and in a sum of many most of it cancels. With all
of it, sound systems of very different models stop too early; with none, float32 factors of few rows
gave solutions a thousand times too large.
"""


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    right: Tensor,
    *,
    on_diagonal: Tensor,
    noise: Tensor,
    tolerance: float,
    iterations: int,
    name: str = "",
) -> Tensor:
    """Return x with S x = b, to a relative residual of `tolerance`.

    S = D + N is preconditioned with its diagonal D, and so is the residual measured,
    √(rᵀ D⁻¹ r / bᵀ D⁻¹ b): an error in a direction counts by what the models know of it.

    In directions in which D is no more than rounding may have made, x is zero; and a system stops
    before a step along which S is: to go as far as such a number says is to go anywhere.

    Args:
        apply: S, a function of tensors shaped like b.
        right: b, `[…, o, i]`; each of the leading axes is a system of its own.
        on_diagonal: D, shaped like b.
        noise: what rounding may amount to in D, likewise.
        tolerance: where to stop.
        iterations: at most so many; a warning says if they were not enough.
        name: of what is solved, for the log.
    """
    seen = on_diagonal > noise
    inverse = torch.where(seen, on_diagonal, 1.0).reciprocal() * seen
    found = torch.zeros_like(right)
    rest = right.clone()
    step = inverse * rest
    size = _dot(rest, step)
    first = size.clone()
    going = first > 0
    done = 0
    while True:
        going = going & (size > first * tolerance**2)
        if done == iterations or not going.any():
            break
        image = apply(step)
        curvature = _dot(step, image)
        going = going & (curvature > _MADE_UP * _dot(step, noise * step))
        length = torch.where(going, size / torch.where(going, curvature, 1.0), 0.0)
        found.addcmul_(length, step)
        rest.addcmul_(-length, image)
        ahead = inverse * rest
        before, size = size, torch.where(going, _dot(rest, ahead), size)
        turn = torch.where(going, size / torch.where(going, before, 1.0), 0.0)
        step = ahead.addcmul_(turn, step)
        done += 1
        if done % _OFTEN == 0:
            LOG.info("%s: %d iterations, residual %.1e", name, done, _relative(size, first))
    reached = _relative(size, first)
    LOG.info("%s: solved in %d iterations to a residual of %.1e", name, done, reached)
    if going.any():
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
