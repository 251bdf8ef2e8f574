"""Gradient checkpointing: a layer's activations are computed again when its gradients need them.

transformers' own switch also needs `model.train()`, which turns dropout on, in places even inside
the checkpointed layers. So the layers that it would checkpoint (`GradientCheckpointingLayer`) are
wrapped here, and nothing else about the model changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from fisher_mergekit.errors import MeasureError


def checkpoint_layers(model: nn.Module) -> None:
    """Keep only the inputs of a model's layers from the forward to the backward pass.

    Raises:
        MeasureError: nothing in this model is marked as a layer.
    """
    layers = list(_outermost(model))
    if not layers:
        raise MeasureError(
            f"{type(model).__name__} has no layers that transformers can checkpoint. Leave out "
            "`gradient_checkpointing: true`, and if memory runs out measure with a smaller "
            "`batch_size`, down to 1, or cut texts with `max_length`."
        )
    for layer in layers:
        layer.forward = _checkpointed(layer.forward)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    # Nothing is random in evaluation mode, so the generators' states need no keeping.
    return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers that are in no other layer."""
    for child in module.children():
        if isinstance(child, GradientCheckpointingLayer):
            yield child
        else:
            yield from _outermost(child)
