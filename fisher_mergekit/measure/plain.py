"""One example alone, by plain autograd: slow, and the rule that is always right."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fisher_mergekit.measure.scaling import all_finite, fitting, halved, is_half, scaled


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
        scale: whose square the totals hold.
        weight: what the squares are multiplied with; -1 to compare.
    """
    chosen = list(parameters)
    if not logits.requires_grad:
        return  # none of them took part
    half = is_half(chosen)
    own = fitting(start) if half else 1.0
    while True:
        gradients = torch.autograd.grad(
            logits,
            chosen,
            scaled(start, own, logits.dtype),
            retain_graph=keep_graph or half,
            allow_unused=True,
        )
        if not half or all_finite(gradients):
            break
        own = halved(own)
    for parameter, gradient in zip(chosen, gradients, strict=True):
        if gradient is not None:
            # Not in place: gradients of several parameters can be views of one tensor.
            squares = gradient.float().mul(scale / own).square_()
            totals[parameter].add_(squares, alpha=weight)
