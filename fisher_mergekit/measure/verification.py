"""Rules are not trusted: they are compared with plain autograd on the model at hand.

Before the first batch, three examples of different lengths, padded together, against each of them
alone and unpadded, for every parameter. What differs climbs to the next slower way of measuring it,
and is compared again. The first full batch of each form has to predict what its examples predict
alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fisher_mergekit.errors import FisherMergekitError, MeasureError
from fisher_mergekit.measure.batches import Batch, Example, collate
from fisher_mergekit.measure.causality import check_causal
from fisher_mergekit.measure.passes import Passes
from fisher_mergekit.measure.plain import add_single_squares, requiring_grad, roundings
from fisher_mergekit.measure.probe import TOLERANCE, FirstBatches, differ, rms, row, spread
from fisher_mergekit.measure.taps import Irregular, Taps

ROUNDINGS = 50
"""How many times as far as plain autograd is from itself a rule may be from it."""

_MOVED = "padding, or what else is in a batch, moves its predictions"


class Verification:
    """Compares the rules of a model's taps with plain autograd, on its own examples.

    Args:
        passes: the model.
        taps: its rules; what is wrong climbs, or is loosened. Their totals are written over.
    """

    def __init__(self, passes: Passes, taps: Taps):
        self._passes = passes
        self._taps = taps
        self._first = FirstBatches(passes.logits)

    def run(self, examples: Sequence[Example]) -> None:
        """Compare batches and rules with plain autograd on single examples, and seal the taps.

        Raises:
            MeasureError: a language model that sees the tokens that it predicts; a model that
                fails on an example alone.
        """
        self._first.begin()
        batch = self._passes.placed(collate(spread(examples, 3), self._passes.pad_token_id))
        try:
            if self._passes.likelihood.is_causal:
                check_causal(self._passes.logits, batch, type(self._passes.model).__name__)
            self._compare(batch)
        except (FisherMergekitError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a model is a program: asserts, missing inputs, …
            self.check_alone(batch)
            self._taps.loosen_all(f"in batches it fails ({_line(error)})")
        self._taps.clear()
        self._taps.seal()

    def is_moved(self, batch: Batch, logits: Tensor) -> bool:
        """Loosen all, and return true, if a first full batch predicts otherwise than alone."""
        if not self._first.is_moved(batch, logits):
            return False
        self._taps.loosen_all(_MOVED)
        return True

    def check_alone(self, batch: Batch) -> None:
        """Raise MeasureError if the model fails on an example alone, plainly: it is not the rules.

        Raises:
            MeasureError: it does, or its gradients are not finite.
        """
        totals = self._taps.totals
        self._taps.clear()
        for index, example in enumerate(batch.examples):
            try:
                with requiring_grad(totals):
                    logits = self._passes.logits(batch.single(index))
                    start = torch.where(logits.isfinite(), 1.0, 0.0)
                    add_single_squares(totals, totals, logits, start)
            except (FisherMergekitError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                raise MeasureError(
                    f"{type(self._passes.model).__name__} fails on example {example.number} of the "
                    f"calibration data ({len(example)} tokens) alone, without anything of this "
                    f"package: {_line(error)}. Leave out such examples, or measure with what the "
                    "model asks for."
                ) from error
        self._taps.check_finite()
        self._taps.clear()

    def _compare(self, batch: Batch) -> None:
        """Verify the rules on a batch, until all that is not loose is right."""
        while wrong := self._wrong(batch):
            self._taps.climb(wrong, "its layer's rule does not hold in this model")

    def _wrong(self, batch: Batch) -> list[nn.Parameter]:
        """Return the parameters whose rule measures something else than plain autograd."""
        if self._taps.is_empty:
            return []
        logits, start = self._verified_pass(batch)
        totals = self._taps.totals
        sizes = {p: rms(total.div_(self._taps.scale**2)) for p, total in totals.items()}
        self._subtract_plain_squares(batch, logits, start)
        differences = {p: rms(total) for p, total in totals.items()}
        self._taps.clear()
        if not all(map(math.isfinite, differences.values())):
            self.check_alone(batch)
            self._taps.loosen_all("its gradients are not finite where there is padding")
            return []
        tolerance, unreached = TOLERANCE[logits.dtype], self._taps.unreached()
        suspects = [
            parameter
            for parameter in totals
            if parameter not in self._taps.loose
            and differences[parameter] > tolerance * sizes[parameter]
        ]
        errors = self._rounding(batch, start, [p for p in suspects if p not in unreached])
        eps = torch.finfo(logits.dtype).eps
        # Where plain autograd finds nothing at all, a rule may find the last digit of a sum.
        zero = max(sizes.values()) * eps**2
        wrong = []
        for parameter in suspects:
            allowed = zero
            if parameter in unreached:  # nothing is measured there later either
                allowed = 0.0
            elif parameter in errors:  # the fewer digits it has, the more
                allowed = sizes[parameter] * max(tolerance, ROUNDINGS * errors[parameter])
            if differences[parameter] > allowed:
                wrong.append(parameter)
        return wrong

    def _rounding(
        self, batch: Batch, start: Tensor, suspects: Sequence[nn.Parameter]
    ) -> dict[nn.Parameter, float]:
        """Return the relative error of plain autograd's own squares, in an example that has any.

        Some gradients are zero on paper (an attention's key bias shifts every score alike), and
        then two right computations have nothing in common.
        """
        errors: dict[nn.Parameter, float] = {}
        for index in range(len(batch)):
            if left := [parameter for parameter in suspects if parameter not in errors]:
                with requiring_grad(left):
                    alone = self._passes.logits(batch.single(index))
                    errors |= roundings(left, alone, row(start, index, alone))
        return errors

    def _subtract_plain_squares(self, batch: Batch, logits: Tensor, start: Tensor) -> None:
        """Take a batch's squares by plain autograd off the totals: no second copy of a model.

        If its logits differ from those of its examples alone, all parameters are loosened.
        """
        totals = self._taps.totals
        with requiring_grad(totals):
            for index in range(len(batch)):
                alone = self._passes.logits(batch.single(index))
                add_single_squares(totals, totals, alone, row(start, index, alone), weight=-1)
                if differ(row(logits, index, alone), alone):
                    self._taps.loosen_all(_MOVED)

    def _verified_pass(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Add the squares of one batch by the rules; return the logits and the start.

        The start is the mean of the estimator's: what only the last of them reaches counts too.
        """
        while True:
            logits = self._taps.forward(self._passes.logits, batch)
            first, *others = starts = self._passes.starts(logits, batch)
            start = sum(others, first) / len(starts)
            self._taps.fit_scale(start)
            try:
                self._taps.backward(logits, start, keep_graph=False)
                return logits.detach(), start
            except Irregular:
                self._taps.clear()


def _line(error: Exception) -> str:
    """Return the first line of what went wrong."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
