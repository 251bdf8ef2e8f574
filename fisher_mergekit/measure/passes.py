"""What a batch's passes need: forward to the logits, and where the backward passes begin."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import Parameter, signature

import torch
from torch import Tensor, nn

from fisher_mergekit.measure.batches import Batch
from fisher_mergekit.measure.estimators import Estimator
from fisher_mergekit.measure.likelihoods.base import Likelihood
from fisher_mergekit.measure.units import Unit, sequence


@dataclass
class Passes:
    """A model, and what is asked of it.

    Args:
        model: a transformers model.
        likelihood: what log p(y|x) is for its head.
        estimator: where y comes from.
        seed: of the sampled estimator's draws.
        pad_token_id: any id; padding is masked.
        device: where the model is.
        unit: whose gradient is squared whole.
    """

    model: nn.Module
    likelihood: Likelihood
    estimator: Estimator
    seed: int
    pad_token_id: int
    device: torch.device
    unit: Unit = sequence

    def placed(self, batch: Batch) -> Batch:
        """Return a batch where the model is, in its dtype."""
        return batch.to(self.device, next(self.model.parameters()).dtype)

    def logits(self, batch: Batch) -> Tensor:
        """Return what the likelihood is a function of, `[b, …]`."""
        self._forget_lengths()
        return self.likelihood.logits(self.model(**self._accepted(batch.inputs)), batch)

    def starts(self, logits: Tensor, batch: Batch) -> list[Tensor]:
        """Return where the batch's backward passes begin, each as the logits."""
        starts = self.estimator.starts(self.likelihood, logits.detach(), batch, self.seed)
        return [self.unit.weigh(start, batch, self.seed) for start in starts]

    def _forget_lengths(self) -> None:
        """Make rotary positions adapt to this batch alone.

        transformers' dynamic ones keep what they made for the longest text that they have seen, so
        that what is predicted for a text would depend on the texts before it.
        """
        for module in self.model.modules():
            for name in vars(module):
                if name.endswith("max_seq_len_cached"):
                    setattr(module, name, 0)

    def _accepted(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the inputs without a mask for a model that takes none (as FNet)."""
        parameters = signature(self.model.forward).parameters
        if "attention_mask" in parameters or any(
            parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values()
        ):
            return inputs
        return {name: x for name, x in inputs.items() if name != "attention_mask"}
