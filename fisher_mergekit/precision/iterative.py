"""Conjugate gradients: S x = b for an S that can be applied but not written down.

Hestenes & Stiefel 1952 (J. Res. Natl. Bur. Stand. 49, 409), preconditioned. S is symmetric positive
semidefinite and b in its range; directions in which S is zero are never taken.

`conjugate_gradients` works in coordinates in which S is nearly diagonal, `refine` in any others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LOG = logging.getLogger(__name__)

_OFTEN = 100
"""Iterations between two lines in the log."""
_MADE_UP = 0.003
"""Share of the noise that a step through many directions has of it.

The noise is a bound for each direction by itself, and in a sum of many most of it cancels. With all
of it, sound systems of very different models stop too early (of 600 random ones in the laws' form
1 still does with 0.01, none with 0.003); with none, float32 factors of few rows gave solutions a
thousand times too large.
"""
_GOOD = 1e-6
"""A residual at which a step that is all rounding tells nothing more."""
_DAMPING = 10.0
"""How many times the noise is added, where it is."""
_ROUNDS = 3
"""How often a damped system is solved for what is left: an error of 1e-3 becomes 1e-9."""


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    right: Tensor,
    *,
    on_diagonal: Tensor,
    noise: Tensor,
    refined: Tensor,
    tolerance: float,
    iterations: int,
    name: str = "",
) -> tuple[Tensor, Tensor]:
    """Find x with S x = b, to a relative residual of `tolerance`.

    S = D + N is preconditioned with its diagonal D, and so is the residual measured,
    √(rᵀ D⁻¹ r / bᵀ D⁻¹ b): an error in a direction counts by what the models know of it.

    In directions in which D is no more than rounding may have made, x is zero. A system that comes
    to a step along which S is no more begins anew, with the noise added to S: to go as far as such
    a number says is to go anywhere, and steps before it may have gone that way in part. Solved
    again for what that leaves (iterated Tikhonov regularisation), it is S x = b to many digits
    where S is much more than the noise; where it is less, x stays near zero.

    Args:
        apply: S, a function of tensors shaped like b.
        right: b, `[…, o, i]`; each of the leading axes is a system of its own.
        on_diagonal: D, shaped like b.
        noise: what rounding may amount to in D, likewise.
        refined: `[…, 1, 1]`, which systems will be refined; a warning can wait till then.
        tolerance: where to stop.
        iterations: at most so many; a warning says if they were not enough.
        name: of what is solved, for the log.

    Returns:
        x, and `[…, 1, 1]`, which systems came to an end within the iterations.
    """
    seen = on_diagonal > noise
    rest = right * seen
    first = _dot(rest, rest * _inverse(on_diagonal, seen))
    limit = first * tolerance**2
    count = _Count(iterations, first, name)
    inverse = _inverse(on_diagonal, seen)
    found, rest, size, lost = _iterate(apply, inverse.mul, rest, limit, count, _MADE_UP * noise)
    if lost.any() and (lost & (size > first * max(tolerance, _GOOD) ** 2)).any():
        # What it took before that step may be large already, so it begins anew.
        added = _DAMPING * noise * seen
        total, rest = torch.zeros_like(right), right * seen
        for turn in range(_ROUNDS):
            gained, rest, left, _ = _iterate(
                lambda x: apply(x).addcmul_(added, x),
                _inverse(on_diagonal + added, seen).mul,
                rest,
                limit,
                count,
            )
            total += gained
            rest.addcmul_(added, gained)  # b - S x
            if turn == 0:
                size = torch.where(lost, left, size)
        found = torch.where(lost, total, found)
        lost = torch.zeros_like(lost)
    count.tell("solved", size)
    ended = (size <= limit) | lost
    if (~ended & ~refined).any():
        count.warn(size, tolerance)
    return found, ended


def refine(
    apply: Callable[[Tensor], Tensor],
    right: Tensor,
    start: Tensor,
    *,
    which: Tensor,
    ended: Tensor,
    precondition: Callable[[Tensor], Tensor],
    noise: Tensor,
    tolerance: float,
    iterations: int,
    name: str = "",
) -> Tensor:
    """Return x with S x = b, to the tolerance, from a solution found in other coordinates.

    Args:
        apply: S, in these coordinates.
        right: b, `[…, o, i]`.
        start: where to begin.
        which: `[…, 1, 1]`, of which systems; the others stay at the start.
        ended: `[…, 1, 1]`, which the start solves as far as those coordinates show it.
        precondition: P, symmetric positive definite; the residual is √(rᵀ P r / bᵀ P b).
        noise: what rounding may amount to in these coordinates, shaped like b. A system that comes
            to a step along which S is no more than that stays at the start: here are no directions
            to choose from, and all of the noise counts.
        tolerance: where to stop.
        iterations: at most so many.
        name: of what is solved, for the log.
    """
    if not which.any():
        return start
    first = _dot(right, precondition(right)) * which
    limit = first * tolerance**2
    count = _Count(iterations, first, name)
    rest = (right - apply(start)) * which
    gained, _, size, lost = _iterate(apply, precondition, rest, limit, count, noise)
    if count.done:
        count.tell("refined", size)
        if ((size > limit) & ~(lost & ended)).any():
            count.warn(size, tolerance)
    return torch.where(lost, start, gained.add_(start))


@dataclass
class _Count:
    """Iterations that are allowed, and done, for all systems of one tensor together."""

    allowed: int
    first: Tensor
    name: str
    done: int = 0

    def add(self, size: Tensor) -> None:
        """Count one, and tell of it now and then."""
        self.done += 1
        if self.done % _OFTEN == 0:
            LOG.info("%s: %d iterations, residual %.1e", self.name, self.done, self.reached(size))

    def reached(self, size: Tensor) -> float:
        """Return the largest relative residual."""
        ratio = size.clamp_min(0) / torch.where(self.first > 0, self.first, 1.0)
        return float(ratio.max().sqrt()) if ratio.numel() else 0.0

    def tell(self, what: str, size: Tensor) -> None:
        """Say how far it came."""
        text = "%s: %s in %d iterations to a residual of %.1e"
        LOG.info(text, self.name, what, self.done, self.reached(size))

    def warn(self, size: Tensor, tolerance: float) -> None:
        """Say that it did not come as far as it should have."""
        LOG.warning(
            "%s: the solution has a residual of %.1e after %d iterations, not the tolerance of "
            "%.1e. Allow more `iterations`, or a larger `tolerance`.",
            self.name,
            self.reached(size),
            self.done,
            tolerance,
        )


def _iterate(
    apply: Callable[[Tensor], Tensor],
    precondition: Callable[[Tensor], Tensor],
    right: Tensor,
    limit: Tensor,
    count: _Count,
    least: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Iterate until rᵀ P r is no more than the limit; no step goes where S is no more than `least`.

    Args:
        precondition: P.

    Returns:
        x, the residual r, rᵀ P r, and which systems stopped before such a step.
    """
    found = torch.zeros_like(right)
    rest = right.clone()
    step = precondition(rest)
    size = _dot(rest, step)
    lost = torch.zeros_like(size, dtype=torch.bool)
    while count.done < count.allowed and (going := (size > limit) & ~lost).any():
        image = apply(step)
        curvature = _dot(step, image)
        enough = curvature > (0.0 if least is None else _dot(step, least * step))
        lost |= going & ~enough
        going &= enough
        length = torch.where(going, size / torch.where(going, curvature, 1.0), 0.0)
        found.addcmul_(length, step)
        rest.addcmul_(-length, image)
        ahead = precondition(rest)
        before, size = size, torch.where(going, _dot(rest, ahead), size)
        turn = torch.where(going, size / torch.where(going, before, 1.0), 0.0)
        step = ahead.addcmul_(turn, step)
        count.add(size)
    return found, rest, size, lost


def _inverse(diagonal: Tensor, seen: Tensor) -> Tensor:
    return torch.where(seen, diagonal, 1.0).reciprocal() * seen


def _dot(one: Tensor, two: Tensor) -> Tensor:
    return (one * two).sum((-2, -1), keepdim=True)
