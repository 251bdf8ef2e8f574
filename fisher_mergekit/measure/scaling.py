"""float16 ends at 65504 and has no numbers between 0 and 6e-8, where many gradients are.

A gradient is linear in the start of its backward pass. So the start is multiplied by a *scale*, a
power of two, and the squares are divided by its square, both of which are exact. The scale is as
large as the start allows and is halved until every gradient is finite. Other dtypes have range
enough, and scale 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fisher_mergekit.errors import MeasureError

LARGEST = 2.0**40
"""Of a sure model; the square of a gradient times this is far from float32's end."""
SMALLEST = 2.0**-40
"""At this scale, a gradient that is not finite is so for another reason than its size."""


class Overflow(Exception):
    """A gradient, times the scale, is not finite."""


def is_half(parameters: Iterable[nn.Parameter]) -> bool:
    """Return whether gradients of these parameters need a scale."""
    return any(p.dtype == torch.float16 for p in parameters)


def fitting(start: Tensor) -> float:
    """Return the largest scale at which a start is surely within float16."""
    exponent = math.frexp(float(start.abs().max()))[1]
    return min(math.ldexp(1.0, 15 - exponent), LARGEST)


def halved(scale: float) -> float:
    """Return the next scale to try.

    Raises:
        MeasureError: it is not what makes gradients infinite.
    """
    if scale <= SMALLEST:
        raise MeasureError(
            "gradients are not finite in float16, however they are scaled. Look for NaN in the "
            "weights, or measure in bfloat16 or float32 (`dtype: bfloat16`)."
        )
    return scale / 2


def scaled(start: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Return `start * scale`, rounded once."""
    return (start if scale == 1 else start * scale).to(dtype)


def all_finite(values: Iterable[Any]) -> bool:
    """Return whether those of the values that are floating tensors are finite."""
    floating = [x for x in values if isinstance(x, Tensor) and x.is_floating_point()]
    return all(bool(x.isfinite().all()) for x in floating)
