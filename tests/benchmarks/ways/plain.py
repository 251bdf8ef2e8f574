"""What needs no library but torch: the ordinary step, and the loop over single examples."""

from __future__ import annotations

import torch
from torch import Tensor

from cases import Case
from ways.base import Way


class Step(Way):
    """An ordinary training step without optimizer; it writes its gradients newly each time."""

    title = "step"
    takes_labels = False

    def __init__(self, case: Case):
        super().__init__(case)
        self._model = case.copy().requires_grad_(True)

    def run(self) -> None:
        batch = self.case.batch
        self._model.zero_grad(set_to_none=True)
        self._model(**batch.inputs, labels=self.case.labels(batch)).loss.backward()


class Forward(Way):
    """A forward pass and nothing else."""

    title = "forward"
    takes_labels = False

    def __init__(self, case: Case):
        super().__init__(case)
        self._model = case.copy()

    @torch.no_grad()
    def run(self) -> None:
        self._model(**self.case.batch.inputs)


class Loop(Way):
    """One example at a time; right by definition, and what the others are compared with."""

    title = "loop"

    def __init__(self, case: Case):
        super().__init__(case)
        self._model = case.copy().requires_grad_(True)
        self._named = dict(self._model.named_parameters())
        self._totals = [torch.zeros_like(parameter) for parameter in self._named.values()]

    def run(self) -> None:
        parameters = list(self._named.values())
        for index in range(len(self.case.batch)):
            single = self.case.batch.single(index)
            logits = self._model(**single.inputs).logits
            log_p = self.case.log_likelihoods(logits, single).sum()
            gradients = torch.autograd.grad(log_p, parameters, allow_unused=True)
            for total, gradient in zip(self._totals, gradients, strict=True):
                if gradient is not None:  # an expert that no token was sent to
                    total.addcmul_(gradient, gradient)

    def squares(self) -> dict[str, Tensor]:
        return dict(zip(self._named, self._totals, strict=True))
