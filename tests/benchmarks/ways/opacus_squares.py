"""Opacus (https://opacus.ai): per-example gradients of all parameters, squared and summed."""

from __future__ import annotations

import torch
from torch import Tensor

from cases import Case
from ways.base import Library, Unable, names


class OpacusSquares(Library):
    """Every parameter's per-example gradients are written down first."""

    title = "Opacus"

    def __init__(self, case: Case):
        super().__init__(case)
        try:
            from opacus.grad_sample import GradSampleModule
        except ImportError as error:
            raise Unable(f"not installed ({error})") from error
        # It measures nothing in evaluation mode; the models here have no dropout.
        model = case.copy().train().requires_grad_(True)
        self._names = names(model)
        self._totals = {p: torch.zeros_like(p) for p in model.parameters()}
        self._model = GradSampleModule(model, loss_reduction="sum")
        self._inputs = dict(case.batch.inputs)
        if hasattr(model.config, "type_vocab_size"):
            # An encoder looks up one row of positions for all examples, of which Opacus makes one
            # example. Told to look them up for each example, it is right.
            ids = self._inputs["input_ids"]
            self._inputs["position_ids"] = torch.arange(ids.shape[1]).expand_as(ids).contiguous()
            self._inputs["token_type_ids"] = torch.zeros_like(ids)

    def run(self) -> None:
        self._model.zero_grad(set_to_none=True)
        logits = self._model(**self._inputs).logits
        (-self.case.log_likelihoods(logits, self.case.batch).sum()).backward()
        for parameter, total in self._totals.items():
            total.add_(parameter.grad_sample.square_().sum(0))
            parameter.grad_sample = None

    def squares(self) -> dict[str, Tensor]:
        return {self._names[parameter]: total for parameter, total in self._totals.items()}
