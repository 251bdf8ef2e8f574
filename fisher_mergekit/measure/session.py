"""THE loop: a model and batches in, the mean squared per-example gradient of each parameter out.

    for each batch
        forward, with every layer tapped: linear layers add their inputs' moments
        for each start of the estimator
            backward: each layer adds its examples' squares, and its output gradients' moments
    divide by the number of examples

Before the first batch the rules are *verified*. A parameter whose rule disagrees with plain
autograd, fails, or was not reached by the examples of the verification is not measured wrongly but
slowly, by that same plain autograd.

What is not asked for is not done: without squares only linear layers are tapped (`listening.py`),
and without output factors nothing goes backward.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fisher_mergekit.errors import FisherMergekitError, MeasureError
from fisher_mergekit.measure.batches import Batch, Example, batches
from fisher_mergekit.measure.factors import Factors
from fisher_mergekit.measure.groups import Unaligned
from fisher_mergekit.measure.limits import BatchSize, Limit
from fisher_mergekit.measure.listening import Listening
from fisher_mergekit.measure.passes import Passes
from fisher_mergekit.measure.plain import add_single_squares, requiring_grad
from fisher_mergekit.measure.taps import Taps
from fisher_mergekit.measure.verification import Verification

LOG = logging.getLogger(__name__)

_LESS_MEMORY = (
    "Less is needed with `gradient_checkpointing: true`, with `max_length` cut, and with "
    "`dtype: bfloat16`."
)


@dataclass
class Session(Passes):
    """One measurement of one model.

    The model is put into evaluation mode, its parameters are frozen, and its caches of keys and
    values are switched off.

    Args:
        parameters: those whose Fisher is measured; all of the model's if None.
        factors: what else is measured of linear layers, if anything.
    """

    parameters: Sequence[nn.Parameter] | None = None
    factors: Factors | None = None

    def __post_init__(self) -> None:
        self.model.eval().requires_grad_(False)
        for module in self.model.modules():  # an encoder and a decoder have configurations apart
            config: Any = getattr(module, "config", None)
            if hasattr(config, "use_cache"):
                config.use_cache = False  # keys and values for later tokens, of which are none
        self._taps = Taps(self.model, self.parameters)
        self._verification = Verification(self, self._taps)
        self._listening = None if self.factors is None else Listening(self, self.factors)
        self._have_own_passes = False

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
        self._clear()
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
        if totals and not any(total.any() for total in totals.values()):
            raise MeasureError(
                "the Fisher is zero everywhere: nothing in the calibration data is scored "
                "(one-token texts, or all of them prompt), or the model is sure of all of it."
            )
        count = len(examples) * self._taps.scale**2
        for total in totals.values():
            total.div_(count)
        self._taps.check_finite()
        if self.factors is not None:
            self.factors.finish()
        return totals

    def _clear(self) -> None:
        self._taps.clear()
        if self.factors is not None:
            self.factors.clear()

    def _add_all(
        self, examples: Sequence[Example], limit: Limit, advance: Callable[[int], Any]
    ) -> Batch | None:
        """Add all examples; return a batch that is too large, nothing added then.

        The batches before it are given up too, rather than anything counted twice. They are few:
        the longest examples come first.
        """
        done = 0
        for unplaced in batches(examples, limit.count, self.pad_token_id):
            batch = self.placed(unplaced)
            try:
                self._add_batch(batch)
            except torch.OutOfMemoryError:
                self._clear()
                advance(-done)
                return batch
            except Unaligned as error:
                self._clear()
                advance(-done)
                self._fall_back(error, unplaced)
                return self._add_all(examples, limit, advance)
            except FisherMergekitError:
                raise
            except Exception:
                self._verification.check_alone(batch)
                raise
            advance(len(batch))
            done += len(batch)
        return None

    def _fall_back(self, error: Unaligned, batch: Batch) -> None:
        """Measure factors in the next slower way; their own passes come first."""
        if error.is_unclear and self._listening is not None:
            self._listening.verify_on(batch)
        elif not self._have_own_passes and self._taps.totals:
            self._have_own_passes = True
        elif self._listening is not None:
            self._listening.fall_back(error)

    def verify(self, examples: Sequence[Example]) -> None:
        """Find out which rules hold; see `Verification.run` and `Listening.verify`."""
        self._taps.factors = Factors({})
        if self._taps.totals:
            self._verification.run(examples)
        if self._listening is not None:
            self._listening.verify(examples)

    @property
    def _shares_passes(self) -> bool:
        """Whether factors are measured in the passes of the squares.

        They are not where a linear layer's own rule does not hold, or examples have to come alone.
        """
        if self.factors is None or self.factors.is_alone or self._have_own_passes:
            return False
        if any(group.is_once for group in self.factors.groups.values()):
            return False  # taps always repeat such a row
        return self._taps.has_rules_for(self.factors.groups)

    def _add_batch(self, batch: Batch) -> None:
        """Add one batch to the totals."""
        shared = self._shares_passes
        self._taps.factors = self.factors if shared and self.factors else Factors({})
        if not self._taps.is_empty:
            self._add_tapped(batch)
        if self._taps.loose:
            self._add_loose(batch)
        if shared and not self._shares_passes:
            raise Unaligned("a rule did not hold", is_shared=True)
        if self._listening is not None and not shared:
            self._listening.add(batch)

    def _add_tapped(self, batch: Batch) -> None:
        """Add the squares of the parameters that a rule covers."""
        logits = self._taps.forward(self.logits, batch)
        if self._verification.is_moved(batch, logits):
            return
        starts = self.starts(logits, batch)
        for number, start in enumerate(starts, start=1):
            self._taps.backward(logits, start, keep_graph=number < len(starts))

    def _add_loose(self, batch: Batch) -> None:
        """Measure the parameters that no rule covers, one example at a time."""
        loose = list(self._taps.loose)
        with requiring_grad(loose):
            for index in range(len(batch)):
                single = batch.single(index)
                logits = self.logits(single)
                starts = self.starts(logits, single)
                for number, start in enumerate(starts, start=1):
                    add_single_squares(
                        self._taps.totals,
                        loose,
                        logits,
                        start,
                        scale=self._taps.scale,
                        keep_graph=number < len(starts),
                    )
