"""NNGeometry (https://nngeometry.readthedocs.io): a `PMatDiag` of the empirical Fisher.

Its rules for Linear and LayerNorm take one vector an example, `[b, d]`; sequences `[b, t, d]` end
in an error. So it is given the layers that see vectors, which one forward pass finds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cases import Case
from ways.base import Library, Unable


class NNGeometryDiagonal(Library):
    """The squares of the layers that it knows, by its hooks."""

    title = "NNGeometry"

    def __init__(self, case: Case):
        super().__init__(case)
        try:
            from nngeometry.backend import TorchHooksJacobianBackend
            from nngeometry.layercollection import LayerCollection
            from nngeometry.object import PMatDiag
        except ImportError as error:
            raise Unable(f"not installed ({error})") from error
        self._matrix = PMatDiag
        self._model = case.copy().requires_grad_(True)
        self._layers = LayerCollection()
        known = LayerCollection._known_modules
        for module in _seeing_vectors(self._model, case):
            if type(module).__name__ in known:
                self._layers.add_layer_from_model(self._model, module)
        if not self._layers.layers:
            raise Unable("its layers take one vector an example, and every layer here sees tokens")
        self._generator = TorchHooksJacobianBackend(
            model=self._model, function=self._log_p, layer_collection=self._layers
        )
        # It asks for gradients of the first input, so that has to be floating.
        with torch.no_grad():
            embedded = self._model.get_input_embeddings()(case.batch.inputs["input_ids"])
        mask, labels = case.batch.inputs["attention_mask"], case.batch.outcome
        self._loader = DataLoader(TensorDataset(embedded, mask, labels), batch_size=len(embedded))
        self._total = torch.zeros(self._layers.numel())

    def _log_p(self, embedded: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        logits = self._model(inputs_embeds=embedded, attention_mask=mask).logits
        batch = replace(self.case.batch, outcome=labels)
        return self.case.log_likelihoods(logits, batch)[:, None]

    def run(self) -> None:
        found = self._matrix(generator=self._generator, examples=self._loader)
        self._total.add_(found.get_diag(), alpha=len(self.case.batch))  # it is a mean

    def squares(self) -> dict[str, Tensor]:
        modules, _ = self._layers.get_layerid_module_maps(self._model)
        found, start = {}, 0
        for name, parameter in self._layers.named_parameters(modules):
            found[name] = self._total[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
        return found


def _seeing_vectors(model: nn.Module, case: Case) -> list[nn.Module]:
    """Return the modules whose input is `[b, d]`."""
    found: list[nn.Module] = []

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].shape[:-1] == (len(case.batch),):
            found.append(module)

    handles = [m.register_forward_pre_hook(look) for m in model.modules()]
    with torch.no_grad():
        model(**case.batch.inputs)
    for handle in handles:
        handle.remove()
    return found
