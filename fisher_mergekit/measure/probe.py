"""What the rules are verified on, and how two measurements are compared."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fisher_mergekit.measure.batches import Batch, Example, by_length

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


class FirstBatches:
    """The first full batch of each form, compared with its examples alone.

    The few examples of a verification may be too few to tell: experts that take no more than so
    many of a batch's tokens are full, or the form is another.

    Args:
        logits_of: runs the model on a batch.
    """

    def __init__(self, logits_of: Callable[[Batch], Tensor]):
        self._logits_of = logits_of
        self._compared: set[object] = set()

    def begin(self) -> None:
        """Compare all forms anew."""
        self._compared.clear()

    def is_moved(self, batch: Batch, logits: Tensor | None = None) -> bool:
        """Return whether it is its form's first, and predicts otherwise than its examples alone.

        Args:
            batch: of a run.
            logits: the batch's, if they are known.
        """
        form = batch.examples[0].form
        if form in self._compared or len(batch) == 1:
            return False
        with torch.no_grad():
            together = self._logits_of(batch) if logits is None else logits.detach()
            for index in sorted({0, len(batch) // 2, len(batch) - 1}):
                alone = self._logits_of(batch.single(index))
                if differ(row(together, index, alone), alone):
                    return True
        self._compared.add(form)  # by now: memory can run out above
        return False


def rms(x: Tensor) -> float:
    """Return the root mean square of all numbers."""
    # In float64, where squares of squares do not vanish, but never all of it at a time.
    parts = x.detach().reshape(-1).split(1 << 22)
    return math.sqrt(sum(float(part.double().square().sum()) for part in parts) / x.numel())
