"""Convolutions in one, two and three dimensions, grouped or not: patches, audio frames, Mamba.

Each example's weight gradient is one call of autograd's own kernel, squared at once: a convolution
has few weights and many positions, so nothing is to be gained from never writing it down.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fisher_mergekit.measure.contributions import Contribution, Vector
from fisher_mergekit.measure.layers.base import OneInput

_CLASSES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Convolution(OneInput):
    """`torch.nn.Conv1d`, `Conv2d` and `Conv3d` with zero padding."""

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return (
            isinstance(module, _CLASSES)
            and any(type(module).forward is c.forward for c in _CLASSES)
            and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
        )

    def backward(
        self, module: Any, x: Tensor, gradient: Tensor
    ) -> tuple[Tensor | None, dict[str, Contribution]]:
        spatial = len(module.kernel_size)
        x, gradient = (_with_rows(z, spatial + 1) for z in (x, gradient))

        def backpropagate(x: Tensor, gradient: Tensor, wanted: list[bool]) -> Any:
            return torch.ops.aten.convolution_backward(
                gradient, x, module.weight, None, module.stride, module.padding, module.dilation,
                False, [0] * spatial, module.groups, wanted,
            )  # fmt: skip

        rows = zip(x, gradient, strict=True)
        weights = [backpropagate(xs, gs, [False, True, False])[1] for xs, gs in rows]
        contributions: dict[str, Contribution] = {"weight": Vector(torch.stack(weights))}
        if module.bias is not None:
            axes = [1, *range(3, gradient.dim())]
            contributions["bias"] = Vector(gradient.float().sum(axes))
        flat = backpropagate(x.flatten(0, 1), gradient.flatten(0, 1), [True, False, False])[0]
        return flat, contributions


def _with_rows(x: Tensor, dimensions: int) -> Tensor:
    """View `[b, channels, …]` as `[b, 1, channels, …]`; several rows an example stay."""
    return x if x.dim() == dimensions + 2 else x.unsqueeze(1)
