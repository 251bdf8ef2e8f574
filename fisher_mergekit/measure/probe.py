"""What the rules are verified on, and how two measurements are compared."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from fisher_mergekit.measure.batches import Example, by_length

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.bfloat16: 0.2, torch.float16: 0.05}
"""Relative difference, by the model's dtype, above which two computations disagree."""


def spread(examples: Sequence[Example], count: int) -> list[Example]:
    """Return up to `count` examples from the longest to the shortest, so that some are padded.

    They are of the commonest form. Examples of which nothing may be scored (they are all prompt)
    would compare zeros with zeros.
    """
    ordered = by_length([e for e in examples if e.is_scored] or examples)
    form, _ = Counter(e.form for e in ordered).most_common(1)[0]
    ordered = [e for e in ordered if e.form == form]
    last = len(ordered) - 1
    places = sorted({round(last * i / (count - 1)) for i in range(count)})
    return [ordered[place] for place in places]


def row(x: Tensor, index: int, alone: Tensor) -> Tensor:
    """Return one example's part of logits or a start, cut to the sizes it has alone."""
    return x[(slice(index, index + 1), *(slice(size) for size in alone.shape[1:]))]


def differ(logits: Tensor, alone: Tensor) -> bool:
    """Return whether an example's logits in a batch are others than those it has alone."""
    finite = alone.isfinite()  # impossible classes have minus infinity
    if not torch.equal(finite, logits.isfinite()):
        return True
    logits, alone = logits.where(finite, 0), alone.where(finite, 0)
    rounding = 50 * torch.finfo(alone.dtype).eps
    return rms(logits - alone) > max(TOLERANCE[alone.dtype] * rms(alone), rounding)


def rms(x: Tensor) -> float:
    """Return the root mean square of all numbers."""
    # In float64, where squares of squares do not vanish, but never all of it at a time.
    parts = x.detach().reshape(-1).split(1 << 22)
    return math.sqrt(sum(float(part.double().square().sum()) for part in parts) / x.numel())
