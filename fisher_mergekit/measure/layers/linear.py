"""Linear: y_bto = Σ_i x_bti W_oi + bias_o, so example b's weight gradient is Σ_t g_bto x_bti."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from fisher_mergekit.measure.contributions import Contribution, Product, Vector
from fisher_mergekit.measure.inputs import Inputs
from fisher_mergekit.measure.layers.base import OneInput, tokens


class Linear(OneInput):
    """`torch.nn.Linear`; of subclasses, those that compute as it does."""

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward

    def described(self, module: nn.Module) -> Collection[str]:
        return ("weight",)

    def inputs(self, module: Any, x: Tensor) -> dict[str, Inputs]:
        return {"weight": Inputs(x)}

    def backward(
        self, module: Any, x: Tensor, gradient: Tensor
    ) -> tuple[Tensor | None, dict[str, Contribution]]:
        rows = tokens(gradient)
        contributions: dict[str, Contribution] = {"weight": Product(rows, tokens(x))}
        if module.bias is not None:
            contributions["bias"] = Vector(rows.float().sum(1))
        return gradient @ module.weight, contributions
