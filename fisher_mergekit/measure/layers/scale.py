"""Modules that only scale or shift features: RMSNorm in all its spellings, learned scales.

They differ in detail (Gemma multiplies by 1 + weight, T5 does not centre, …), so nothing is assumed
but that parameters act along the last axis. The module runs again with each parameter expanded to
one copy an example, and autograd gives every example its own gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fisher_mergekit.measure.contributions import Contribution, Vector
from fisher_mergekit.measure.layers.base import OneInput, own_parameters


class Scale(OneInput):
    """Any module without children whose name ends in `Norm` and whose parameters are vectors."""

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        own = own_parameters(module).values()
        return (
            type(module).__name__.endswith("Norm")
            and not isinstance(module, nn.LayerNorm)
            and next(module.children(), None) is None
            and len(own) > 0
            and len({p.shape for p in own}) == 1
            and all(p.dim() == 1 for p in own)
        )

    def backward(
        self, module: Any, x: Tensor, gradient: Tensor
    ) -> tuple[Tensor | None, dict[str, Contribution]]:
        own = own_parameters(module)
        axes = (x.shape[0], *[1] * (x.dim() - 2), -1)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            copies = {
                name: p.detach().expand(x.shape[0], -1).clone().view(axes).requires_grad_()
                for name, p in own.items()
            }
            y = functional_call(module, copies, (x,))
            x_gradient, *gradients = torch.autograd.grad(y, (x, *copies.values()), gradient)
        return x_gradient, {
            name: Vector(g.flatten(1)) for name, g in zip(copies, gradients, strict=True)
        }
