"""THE loop: a model and batches in, the mean squared per-example gradient of each parameter out.

    for each batch
        forward, with every layer tapped
        for each start of the estimator
            backward: each layer adds its examples' squares
    divide by the number of examples

Before the first batch the rules are *verified*: three examples of different lengths, padded
together, against plain autograd on each of them alone and unpadded, for every parameter. A
parameter whose rule disagrees, fails, or was not reached by these three examples is not measured
wrongly but slowly, by that same plain autograd. The first full batch of each form has to predict
what its examples predict alone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn

from fisher_mergekit.errors import FisherMergekitError, MeasureError
from fisher_mergekit.measure.axes import Axes
from fisher_mergekit.measure.batches import Batch, Example, batches, collate
from fisher_mergekit.measure.causality import check_causal
from fisher_mergekit.measure.estimators import Estimator
from fisher_mergekit.measure.likelihoods.base import Likelihood
from fisher_mergekit.measure.limits import BatchSize, Limit
from fisher_mergekit.measure.plain import add_single_squares, requiring_grad, roundings
from fisher_mergekit.measure.probe import TOLERANCE, differ, rms, row, spread
from fisher_mergekit.measure.taps import Irregular, Taps
from fisher_mergekit.measure.units import Unit, sequence

LOG = logging.getLogger(__name__)

ROUNDINGS = 50
"""How many times as far as plain autograd is from itself a rule may be from it."""

_MOVED = "padding, or what else is in a batch, moves its predictions"
_LESS_MEMORY = (
    "Less is needed with `gradient_checkpointing: true`, with `max_length` cut, and with "
    "`dtype: bfloat16`."
)


@dataclass
class Session:
    """One measurement of one model.

    Args:
        model: a transformers model; put into evaluation mode, its parameters frozen, its caches of
            keys and values switched off.
        likelihood: what log p(y|x) is for its head.
        estimator: where y comes from.
        seed: of the sampled estimator's draws.
        pad_token_id: any id; padding is masked.
        device: where the model is.
        unit: whose gradient is squared whole.
        parameters: those to measure; all of the model's if None.
    """

    model: nn.Module
    likelihood: Likelihood
    estimator: Estimator
    seed: int
    pad_token_id: int
    device: torch.device
    unit: Unit = sequence
    parameters: Sequence[nn.Parameter] | None = None

    def __post_init__(self) -> None:
        self.model.eval().requires_grad_(False)
        for module in self.model.modules():  # an encoder and a decoder have configurations apart
            config: Any = getattr(module, "config", None)
            if hasattr(config, "use_cache"):
                config.use_cache = False  # keys and values for later tokens, of which are none
        self._taps = Taps(self.model, self.parameters)
        self._compared: set[object] = set()

    @property
    def loose(self) -> tuple[str, ...]:
        """Names of the parameters that are measured one example at a time."""
        return tuple(self._taps.loose.values())

    @property
    def again(self) -> tuple[str, ...]:
        """Names of the parameters whose module runs again for each example."""
        return tuple(self._taps.again)

    @torch.enable_grad()
    def run(
        self,
        examples: Sequence[Example],
        batch_size: BatchSize,
        advance: Callable[[int], Any] = lambda count: None,
    ) -> dict[nn.Parameter, Tensor]:
        """Return the diagonal Fisher of the parameters, float32, the mean over the examples.

        The tensors are the session's accumulators; another run begins in them anew.

        Args:
            examples: tokenised calibration data, at least one.
            batch_size: examples, or `auto`; changes speed and memory only.
            advance: called with the number of examples after each batch, and with minus what
                was done when it begins again with smaller batches.

        Raises:
            MeasureError: a gradient is not finite, or all of them are zero; or the device has not
                memory enough.
        """
        self._taps.clear()
        self._compared.clear()
        try:
            self.verify(examples)
        except torch.OutOfMemoryError:
            raise MeasureError(
                f"memory runs out on {self.device} while the rules are verified on three examples. "
                f"{_LESS_MEMORY}"
            ) from None
        limit = Limit.of(batch_size, self.device).at_most(self._taps.most_examples)
        while (failed := self._add_all(examples, limit, advance)) is not None:
            smaller = limit.halved(failed)
            if smaller is None:
                raise MeasureError(
                    f"memory runs out on {self.device} with a batch of {len(failed)}. "
                    f"{'' if len(failed) == 1 else 'Use `batch_size: auto`. '}{_LESS_MEMORY}"
                )
            LOG.info("Memory runs out with %s tokens a batch: %s.", limit.tokens, smaller.tokens)
            limit = smaller
        totals = self._taps.totals
        if not any(total.any() for total in totals.values()):
            raise MeasureError(
                "the Fisher is zero everywhere: nothing in the calibration data is scored "
                "(one-token texts, or all of them prompt), or the model is sure of all of it."
            )
        count = len(examples) * self._taps.scale**2
        for total in totals.values():
            total.div_(count)
        self._check_finite()
        return totals

    def _add_all(
        self, examples: Sequence[Example], limit: Limit, advance: Callable[[int], Any]
    ) -> Batch | None:
        """Add the squares of all examples; return a batch that is too large, nothing added then.

        The batches before it are given up too, rather than any square counted twice. They are few:
        the longest examples come first.
        """
        done = 0
        for unplaced in batches(examples, limit.count, self.pad_token_id):
            batch = self._placed(unplaced)
            try:
                self._add_batch(batch)
            except torch.OutOfMemoryError:
                self._taps.clear()
                advance(-done)
                return batch
            except FisherMergekitError:
                raise
            except Exception:
                self._check_alone(batch)
                raise
            advance(len(batch))
            done += len(batch)
        return None

    def verify(self, examples: Sequence[Example]) -> None:
        """Compare batches and rules with plain autograd on single examples.

        What differs climbs to the next slower way of measuring it, and is compared again.

        Raises:
            MeasureError: a language model that sees the tokens that it predicts; a model that
                fails on an example alone.
        """
        batch = self._placed(collate(spread(examples, 3), self.pad_token_id))
        try:
            if self.likelihood.is_causal:
                check_causal(self._logits, batch, type(self.model).__name__)
            self._compare(batch)
        except (FisherMergekitError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a model is a program: asserts, missing inputs, …
            self._check_alone(batch)
            self._taps.loosen_all(f"in batches it fails ({_line(error)})")
        self._taps.clear()
        self._taps.seal()

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
            self._check_alone(batch)
            self._taps.loosen_all("its gradients are not finite where there is padding")
            return []
        tolerance, unreached = TOLERANCE[logits.dtype], self._taps.unreached()
        suspects = [
            parameter
            for _, parameter in self._measured()
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
                    alone = self._logits(batch.single(index))
                    errors |= roundings(left, alone, row(start, index, alone))
        return errors

    def _subtract_plain_squares(self, batch: Batch, logits: Tensor, start: Tensor) -> None:
        """Take a batch's squares by plain autograd off the totals: no second copy of a model.

        If its logits differ from those of its examples alone, all parameters are loosened.
        """
        totals = self._taps.totals
        with requiring_grad(totals):
            for index in range(len(batch)):
                alone = self._logits(batch.single(index))
                add_single_squares(totals, totals, alone, row(start, index, alone), weight=-1)
                if differ(row(logits, index, alone), alone):
                    self._taps.loosen_all(_MOVED)

    def _check_alone(self, batch: Batch) -> None:
        """Raise MeasureError if the model fails on an example alone, plainly: it is not the rules.

        Raises:
            MeasureError: it does, or its gradients are not finite.
        """
        totals = self._taps.totals
        self._taps.clear()
        for index, example in enumerate(batch.examples):
            try:
                with requiring_grad(totals):
                    logits = self._logits(batch.single(index))
                    start = torch.where(logits.isfinite(), 1.0, 0.0)
                    add_single_squares(totals, totals, logits, start)
            except (FisherMergekitError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                raise MeasureError(
                    f"{type(self.model).__name__} fails on example {example.number} of the "
                    f"calibration data ({len(example)} tokens) alone, without anything of this "
                    f"package: {_line(error)}. Leave out such examples, or measure with what the "
                    "model asks for."
                ) from error
        self._check_finite()
        self._taps.clear()

    def _check_finite(self) -> None:
        for name, parameter in self._measured():
            if not self._taps.totals[parameter].isfinite().all():
                raise MeasureError(
                    f"the Fisher of {name} is not finite. Look for NaN in the weights, or measure "
                    "in float32 (`dtype: float32`)."
                )

    def _verified_pass(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Add the squares of one batch by the rules; return the logits and the start.

        The start is the mean of the estimator's: what only the last of them reaches counts too.
        """
        while True:
            logits = self._tapped_logits(batch)
            first, *others = starts = self._starts(logits, batch)
            start = sum(others, first) / len(starts)
            self._taps.fit_scale(start)
            try:
                self._taps.backward(logits, start, keep_graph=False)
                return logits.detach(), start
            except Irregular:
                self._taps.clear()

    def _placed(self, batch: Batch) -> Batch:
        return batch.to(self.device, next(self.model.parameters()).dtype)

    def _measured(self) -> list[tuple[str, nn.Parameter]]:
        """Return the parameters to measure, with their names."""
        return [(n, p) for n, p in self.model.named_parameters() if p in self._taps.totals]

    def _add_batch(self, batch: Batch) -> None:
        """Add the squares of one batch to the totals."""
        if not self._taps.is_empty:
            self._add_tapped(batch)
        if self._taps.loose:
            self._add_loose(batch)

    def _add_tapped(self, batch: Batch) -> None:
        """Add the squares of the parameters that a rule covers."""
        logits = self._tapped_logits(batch)
        if self._is_moved(batch, logits):
            self._taps.loosen_all(_MOVED)
            return
        starts = self._starts(logits, batch)
        for number, start in enumerate(starts, start=1):
            self._taps.backward(logits, start, keep_graph=number < len(starts))

    def _is_moved(self, batch: Batch, logits: Tensor) -> bool:
        """Return whether the first batch of a form, a full one, predicts otherwise than alone.

        The three examples of the verification may be too few for it: experts that take no more
        than so many of a batch's tokens are full, or the form is another.
        """
        form = batch.examples[0].form
        if form in self._compared or len(batch) == 1:
            return False
        with torch.no_grad():
            for index in sorted({0, len(batch) // 2, len(batch) - 1}):
                alone = self._logits(batch.single(index))
                if differ(row(logits.detach(), index, alone), alone):
                    return True
        self._compared.add(form)  # by now: memory can run out above
        return False

    def _tapped_logits(self, batch: Batch) -> Tensor:
        while True:
            try:
                return self._taps.forward(lambda: self._logits(batch), Axes.of(batch), self.device)
            except Irregular:
                continue  # its parameters have climbed, and nothing has been added yet

    def _starts(self, logits: Tensor, batch: Batch) -> list[Tensor]:
        starts = self.estimator.starts(self.likelihood, logits.detach(), batch, self.seed)
        return [self.unit.weigh(start, batch, self.seed) for start in starts]

    def _add_loose(self, batch: Batch) -> None:
        """Measure the parameters that no rule covers, one example at a time."""
        loose = list(self._taps.loose)
        with requiring_grad(loose):
            for index in range(len(batch)):
                single = batch.single(index)
                logits = self._logits(single)
                starts = self._starts(logits, single)
                for number, start in enumerate(starts, start=1):
                    add_single_squares(
                        self._taps.totals,
                        loose,
                        logits,
                        start,
                        scale=self._taps.scale,
                        keep_graph=number < len(starts),
                    )

    def _logits(self, batch: Batch) -> Tensor:
        return self.likelihood.logits(self.model(**self._accepted(batch.inputs)), batch)

    def _accepted(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the inputs without a mask for a model that takes none (as FNet)."""
        parameters = signature(self.model.forward).parameters
        if "attention_mask" in parameters or any(
            parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values()
        ):
            return inputs
        return {name: x for name, x in inputs.items() if name != "attention_mask"}


def _line(error: Exception) -> str:
    """Return the first line of what went wrong."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
