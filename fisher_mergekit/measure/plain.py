"""One example alone, by plain autograd: slow, and the rule that is always right."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fisher_mergekit.measure.probe import rms
from fisher_mergekit.measure.scaling import all_finite, fitting, halved, is_half, scaled

FACTORS = (3, 5)
"""Of a start; powers of two would change no rounding."""
TINY = torch.finfo(torch.float32).tiny


def add_single_squares(
    totals: dict[nn.Parameter, Tensor],
    parameters: Iterable[nn.Parameter],
    logits: Tensor,
    start: Tensor,
    *,
    scale: float = 1.0,
    weight: float = 1.0,
    keep_graph: bool = False,
) -> None:
    """Add the squared gradient of one example.

    Args:
        totals: float32 accumulator of each parameter.
        parameters: those to measure; they require gradients.
        logits: of the example alone, `[1, …]`.
        start: where the backward pass begins, as the logits.
        scale: whose square the totals hold.
        weight: what the squares are multiplied with; -1 to compare.
        keep_graph: whether another backward pass follows.
    """
    chosen = list(parameters)
    gradients, own = _gradients(chosen, logits, start, keep_graph=keep_graph)
    for parameter, gradient in zip(chosen, gradients, strict=True):
        if gradient is not None:
            # Not in place: gradients of several parameters can be views of one tensor.
            squares = gradient.float().mul(scale / own).square_()
            totals[parameter].add_(squares, alpha=weight)


def roundings(
    parameters: Sequence[nn.Parameter], logits: Tensor, start: Tensor
) -> dict[nn.Parameter, float]:
    """Return how many digits one example's squares have: how far they are from themselves.

    A gradient is linear in its start, but three times the start is rounded otherwise at every step.

    Returns:
        Relative differences; none for a parameter whose gradient is nothing but zeros here.
    """
    first, scale = _gradients(parameters, logits, start, keep_graph=True)
    found: dict[nn.Parameter, float] = {}
    for factor in FACTORS:
        more = factor != FACTORS[-1]
        others, other = _gradients(parameters, logits, factor * start, keep_graph=more)
        for parameter, one, two in zip(parameters, first, others, strict=True):
            if one is not None and two is not None and one.any():
                squares = one.float().div(scale).square_()
                again = two.float().div(factor * other).square_()
                difference = rms(again - squares) / max(rms(squares), TINY)
                found[parameter] = max(found.get(parameter, 0.0), difference)
    return found


def _gradients(
    parameters: Sequence[nn.Parameter], logits: Tensor, start: Tensor, *, keep_graph: bool = False
) -> tuple[Sequence[Tensor | None], float]:
    """Return the gradients, None for what took no part, and the scale that they are multiplied by.

    In half precision the scale is the largest by which all of them are finite.
    """
    if not logits.requires_grad:
        return [None] * len(parameters), 1.0
    half = is_half(parameters)
    scale = fitting(start) if half else 1.0
    while True:
        gradients = torch.autograd.grad(
            logits,
            parameters,
            scaled(start, scale, logits.dtype),
            retain_graph=keep_graph or half,
            allow_unused=True,
        )
        if not half or all_finite(gradients):
            return gradients, scale
        scale = halved(scale)


@contextmanager
def requiring_grad(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let some parameters require gradients inside the block."""
    chosen = list(parameters)
    try:
        for parameter in chosen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in chosen:
            parameter.requires_grad_(False)
