"""Kronfluence (https://github.com/pomonam/kronfluence), `strategy="diagonal"`.

What is timed is what its `fit_lambda_matrices_with_loader` does with one batch.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cases import Case
from ways.base import Library, Unable, names


class KronfluenceDiagonal(Library):
    """Every Linear's per-example gradients at once, squared and summed."""

    title = "Kronfluence"

    def __init__(self, case: Case):
        super().__init__(case)
        try:
            from kronfluence.analyzer import prepare_model
            from kronfluence.arguments import FactorArguments
            from kronfluence.module.tracked_module import ModuleMode, TrackedModule
            from kronfluence.module.utils import set_mode, update_factor_args
            from kronfluence.task import Task
        except ImportError as error:
            raise Unable(f"not installed ({error})") from error

        class LogLikelihood(Task):
            """The loss, summed; what is not about the loss is never called."""

            def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Any:
                return -case.log_likelihoods(model(**batch.inputs).logits, batch).sum()

            def compute_measurement(self, batch: Any, model: nn.Module) -> Any:
                raise NotImplementedError

        self._task = LogLikelihood()
        model = case.copy()
        self._names = names(model)
        self._model = prepare_model(model, self._task)
        update_factor_args(
            self._model, FactorArguments(strategy="diagonal", use_empirical_fisher=True)
        )
        set_mode(self._model, ModuleMode.LAMBDA, release_memory=True)
        self._tracked = [m for m in self._model.modules() if isinstance(m, TrackedModule)]

    def run(self) -> None:
        self._model.zero_grad(set_to_none=True)
        self._task.compute_train_loss(self.case.batch, self._model).backward()

    def squares(self) -> dict[str, Tensor]:
        from kronfluence.utils.constants import LAMBDA_MATRIX_NAME

        found = {}
        for tracked in self._tracked:
            squares, linear = tracked.storage[LAMBDA_MATRIX_NAME], tracked.original_module
            if squares is None:
                continue  # never called
            if linear.bias is not None:  # stands as the last column
                found[self._names[linear.bias]] = squares[:, -1]
                squares = squares[:, :-1]
            found[self._names[linear.weight]] = squares
        return found

    def notes(self) -> list[str]:
        if getattr(self.case.model.config, "tie_word_embeddings", False) and not self.case.classes:
            return ["of a tied head it measures the head's part alone, which is another quantity"]
        return []
