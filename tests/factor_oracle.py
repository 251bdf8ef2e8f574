"""Input and output factors the slow way: examples alone, in float64, by watching plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from fisher_mergekit.measure.batches import Example

Factors = dict[str, Tensor]


class _Watch(TorchFunctionMode):
    """Hand every linear map's weight, input rows and output to a function."""

    def __init__(self, seen: Callable[[Tensor, Tensor, Tensor], None]):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, function, types, args=(), kwargs=None):
        y = function(*args, **(kwargs or {}))
        if function is nn.functional.linear:
            self.seen(args[1], args[0], y)
        return y


@contextmanager
def watched(model: nn.Module, seen: Callable[[str, int | None, Tensor, Tensor], None]):
    """Call `seen(weight's name, expert or None, input rows, output)` for every linear map."""
    places = {}
    for name, p in model.named_parameters():
        for expert, matrix in enumerate(p if p.dim() == 3 else [p]):
            places[matrix.data_ptr()] = name, expert if p.dim() == 3 else None

    def linear(weight: Tensor, x: Tensor, y: Tensor) -> None:
        if weight.data_ptr() in places:
            seen(*places[weight.data_ptr()], x, y)

    def conv1d(module: nn.Module, args: tuple, y: Tensor) -> None:
        seen(*places[module.weight.data_ptr()], args[0], y)

    hooks = [m.register_forward_hook(conv1d) for m in model.modules() if type(m) is Conv1D]
    try:
        with _Watch(linear):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def measure(
    model: nn.Module,
    examples: Sequence[Example],
    outcomes: Callable[[Tensor, Example], list[tuple[float, Tensor]]],
) -> tuple[Factors, dict[str, Tensor], Factors]:
    """Return Σ x xᵀ, the number of rows, and Σ g gᵀ of every linear map, by weight.

    Args:
        model: in float64.
        outcomes: of an example's logits: (probability, log p(y|x)) of every outcome that counts.
    """
    inputs: Factors = {}
    rows: dict[str, Tensor] = {}
    outputs: Factors = {}

    def add(into: Factors, name: str, expert: int | None, value: Tensor) -> None:
        shape = dict(model.named_parameters())[name].shape
        if expert is None:
            into[name] = into.get(name, 0) + value
            return
        into.setdefault(name, torch.zeros(shape[0], *value.shape, dtype=torch.float64))
        into[name][expert] += value

    taps: list[tuple[str, int | None, Tensor]] = []

    def seen(name: str, expert: int | None, x: Tensor, y: Tensor) -> None:
        flat = x.detach().reshape(-1, x.shape[-1])
        add(inputs, name, expert, flat.mT @ flat)
        add(rows, name, expert, torch.tensor(float(len(flat)), dtype=torch.float64))
        taps.append((name, expert, y))

    for example in examples:
        taps.clear()
        with watched(model, seen):
            mask = torch.ones_like(example.inputs["input_ids"])
            logits = model(**example.inputs, attention_mask=mask).logits
        for probability, log_p in outcomes(logits, example):
            gradients = torch.autograd.grad(
                log_p, [y for *_, y in taps], retain_graph=True, allow_unused=True
            )
            for (name, expert, y), g in zip(taps, gradients, strict=True):
                flat = torch.zeros_like(y) if g is None else g
                flat = flat.reshape(-1, y.shape[-1])
                add(outputs, name, expert, probability * (flat.mT @ flat))
    return inputs, rows, outputs


def classes(logits: Tensor, example: Example) -> list[tuple[float, Tensor]]:
    """Every class of a classifier."""
    log_p = logits[0].log_softmax(-1)
    return [(float(x.exp()), x) for x in log_p]


def next_tokens_given(outcomes: dict[int, Tensor]):
    """One drawn text for each example: its tokens, `[t]` by the example's number."""

    def given(logits: Tensor, example: Example) -> list[tuple[float, Tensor]]:
        log_p = logits[0].log_softmax(-1)
        y = outcomes[example.number]
        at = torch.arange(len(y))
        return [(1.0, (log_p[at, y] * example.scored).sum())]

    return given
