"""LayerNorm: y = x̂ ⊙ weight + bias with x̂ the input at mean 0 and variance 1 over features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fisher_mergekit.measure.contributions import Contribution, Vector
from fisher_mergekit.measure.layers.base import OneInput, tokens


class LayerNorm(OneInput):
    """`torch.nn.LayerNorm` over the last axis."""

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return (
            isinstance(module, nn.LayerNorm)
            and type(module).forward is nn.LayerNorm.forward
            and len(module.normalized_shape) == 1
            and module.weight is not None
        )

    def backward(
        self, module: Any, x: Tensor, gradient: Tensor
    ) -> tuple[Tensor | None, dict[str, Contribution]]:
        # x̂ is computed again, which is cheaper than to keep it; its statistics serve both uses.
        shape = list(module.normalized_shape)
        normal, *statistics = torch.native_layer_norm(x, shape, None, None, module.eps)
        x_gradient = torch.ops.aten.native_layer_norm_backward(
            gradient, x, shape, *statistics, module.weight, module.bias, [True, False, False]
        )[0]
        scores = tokens(gradient).float()
        contributions: dict[str, Contribution] = {
            "weight": Vector(tokens(normal).float().mul_(scores).sum(1))
        }
        if module.bias is not None:
            contributions["bias"] = Vector(scores.sum(1))
        return x_gradient, contributions
