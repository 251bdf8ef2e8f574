"""LayerNorm: y = x̂ ⊙ weight + bias with x̂ the input at mean 0 and variance 1 over features."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
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
        # x̂ is needed for the weight and for the input alike: it is computed again, once for both.
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            normal = F.layer_norm(x, module.normalized_shape, eps=module.eps)
            (x_gradient,) = torch.autograd.grad(normal, x, gradient * module.weight)
        scores = tokens(gradient).float()
        contributions: dict[str, Contribution] = {
            "weight": Vector((scores * tokens(normal.detach())).sum(1))
        }
        if module.bias is not None:
            contributions["bias"] = Vector(scores.sum(1))
        return x_gradient, contributions
