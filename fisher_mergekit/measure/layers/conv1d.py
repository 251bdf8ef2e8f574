"""GPT-2's Conv1D: a linear layer that stores its weight transposed, `[in, out]`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D as TransformersConv1D

from fisher_mergekit.measure.contributions import Contribution, Product, Vector
from fisher_mergekit.measure.inputs import Inputs, Use
from fisher_mergekit.measure.layers.base import OneInput, tokens


class Conv1D(OneInput):
    """`transformers.pytorch_utils.Conv1D`: y = x W + bias."""

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return type(module) is TransformersConv1D

    def described(self, module: nn.Module) -> Collection[str]:
        return ("weight",)

    def inputs(self, module: Any, x: Tensor) -> dict[str, Inputs]:
        return {"weight": Inputs(x, Use(axis=-2))}

    def backward(
        self, module: Any, x: Tensor, gradient: Tensor
    ) -> tuple[Tensor | None, dict[str, Contribution]]:
        cols = tokens(gradient)
        return gradient @ module.weight.T, {
            "weight": Product(tokens(x), cols),
            "bias": Vector(cols.float().sum(1)),
        }
