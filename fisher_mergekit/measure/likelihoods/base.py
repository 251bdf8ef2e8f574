"""What a likelihood has to say of itself, always in terms of the logits.

The gradient of log p(y|x) with respect to the parameters is Jᵀ s with J the Jacobian of the logits
and s the *score* of y, ∂ log p(y|x) / ∂ logits. Every estimator only needs scores.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from torch import Tensor

from fisher_mergekit.errors import CalibrationError, MeasureError
from fisher_mergekit.measure.batches import Batch, Example
from fisher_mergekit.measure.calibration import Row
from fisher_mergekit.measure.encoding import Encoded, Encoder


class Likelihood(ABC):
    """One head's likelihood."""

    known: ClassVar[list[type[Likelihood]]] = []
    name: ClassVar[str]
    heads: ClassVar[tuple[str, ...]]
    """Ends of the names of the transformers classes that have this head."""
    default_estimator: ClassVar[str]
    needs_label: ClassVar[bool] = True
    """Whether the empirical estimator needs a label column."""
    has_positions: ClassVar[bool] = False
    """Whether log p is a sum over positions of the logits, so that `unit: token` says something."""
    has_prompt: ClassVar[bool] = False
    """Whether a part of the text can be left unscored, `mask_prompt: true`."""
    is_causal: ClassVar[bool] = False
    """Whether the logits at a position must not depend on the tokens after it."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "heads" in cls.__dict__:  # what has none is there to be inherited from
            Likelihood.known.append(cls)

    @classmethod
    def fits(cls, architecture: str, config: Any) -> bool:
        """Return whether a transformers class with this configuration (or None) has this head."""
        return architecture.endswith(cls.heads)

    def check(self, config: Any, unit: str) -> None:
        """Raise MeasureError if the configuration or the unit makes no sense for this head."""
        if unit == "token" and not self.has_positions:
            raise MeasureError(
                f"`unit: token` is for models that predict something at every token, and a "
                f"{self.name.replace('_', ' ')} head does not. Leave out `unit:`."
            )

    @abstractmethod
    def passes(self, config: Any, examples: Sequence[Example]) -> int:
        """Return the number of columns of `factor`: what `exact` costs in backward passes."""

    @abstractmethod
    def encode(self, row: Row, encoder: Encoder) -> Encoded:
        """Return what an example made of this row gives the model, scores, and observed.

        Raises:
            CalibrationError: the row has no such thing, or another one than this head needs.
        """

    def logits(self, output: Any, batch: Batch) -> Tensor:
        """Return what the likelihood is a function of, the examples along the first axis."""
        logits: Tensor = output.logits
        return logits

    @abstractmethod
    def score(self, logits: Tensor, batch: Batch, outcome: Tensor) -> Tensor:
        """Return ∂ log p(outcome|x) / ∂ logits, `[b, …]` as the logits."""

    @abstractmethod
    def sample(self, logits: Tensor, batch: Batch, seed: int) -> Tensor:
        """Draw one outcome an example; the draw depends on the seed and the example alone."""

    def sampled_score(self, logits: Tensor, batch: Batch, seed: int) -> Tensor:
        """Return the score of what `sample` draws."""
        return self.score(logits, batch, self.sample(logits, batch, seed))

    def observed(self, batch: Batch) -> Tensor:
        """Return the outcomes in the data.

        Raises:
            CalibrationError: the data has none.
        """
        if batch.outcome is None:
            raise CalibrationError("the empirical estimator needs a label for every example.")
        return batch.outcome

    @abstractmethod
    def factor(self, logits: Tensor, batch: Batch) -> Iterator[Tensor]:
        """Yield columns l_k with Σ_k l_k l_kᵀ = E_y [score scoreᵀ], each as the logits."""
