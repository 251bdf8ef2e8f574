"""Embedding: y_btd = W[ids_bt, d], so example b's gradient is g_btd added at row ids_bt."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from fisher_mergekit.measure.contributions import Contribution, Scatter
from fisher_mergekit.measure.inputs import Inputs, Use
from fisher_mergekit.measure.layers.base import OneInput, Unfit


class Embedding(OneInput):
    """`torch.nn.Embedding` of ids `[b, t]`, and Gemma's, which scales what it finds."""

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return (
            isinstance(module, nn.Embedding)
            and module.max_norm is None
            and not module.scale_grad_by_freq
        )

    def described(self, module: nn.Module) -> Collection[str]:
        return ("weight",)

    def inputs(self, module: Any, x: Tensor) -> dict[str, Inputs]:
        # What is no ids has no row for each token, and no backward either.
        is_ids = not x.is_floating_point()
        return {"weight": Inputs(x, Use(is_lookup=True, axis=-2))} if is_ids else {}

    def backward(
        self, module: Any, x: Tensor, gradient: Tensor
    ) -> tuple[Tensor | None, dict[str, Contribution]]:
        if x.is_floating_point():  # BART's positions are given the words' vectors, and count them
            raise Unfit("its input is no ids")
        values = gradient.float()
        if type(module).forward is not nn.Embedding.forward:
            values = values * getattr(module, "embed_scale", 1.0)
        if module.padding_idx is not None:
            # The row at padding_idx is a constant to PyTorch: it is never trained.
            values = values.masked_fill((x == module.padding_idx).unsqueeze(-1), 0.0)
        ids = x.reshape(x.shape[0], -1)
        return None, {"weight": Scatter(ids, values.reshape(*ids.shape, -1))}
