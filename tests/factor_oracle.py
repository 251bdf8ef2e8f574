"""Input and output factors the slow way: examples alone, in float64, by watching plain PyTorch.

Whatever product has a view of a parameter in it is a linear map, be it written as a module, as `@`
or as a product of batches. Which of the parameter's axes the inputs run along, and which expert it
is, is read off the view's strides and offset.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fisher_mergekit.measure.batches import Batch, Example, collate

Factors = dict[str, Tensor]

_PRODUCTS = {
    torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm,
}  # fmt: skip
_CASTS = {Tensor.to, Tensor.type, Tensor.float, Tensor.double}


@dataclass
class Use:
    """One product with a matrix: `rows @ matrix` is `y`.

    Attributes:
        name: of the parameter, of which the matrix is a part.
        expert: which one of a `[e, …]` parameter's matrices it is; None if it has but one.
        axis: of the parameter, along which the inputs run.
        rows: as they were at that moment.
        is_batched: it was one of a product of batches.
        gradient: with respect to the product as it was, of the last backward pass.
    """

    name: str
    expert: int | None
    axis: int
    rows: Tensor
    width: int
    is_batched: bool = False
    gradient: Tensor | None = None

    def hear(self, y: Tensor, index: int | None = None) -> Use:
        """Note the gradient when it comes; of one of a product of batches, its part."""

        def keep(gradient: Tensor) -> None:
            self.gradient = gradient if index is None else gradient[index]

        if y.requires_grad:
            y.register_hook(keep)
        return self


@dataclass
class Measured:
    """Sums over all examples, by the parameter's name; `[e, …]` of experts.

    Attributes:
        inputs: Σ x xᵀ.
        rows: how many.
        outputs: Σ g gᵀ.
        axes: along which the inputs run.
        lookups: how often each row of a table was looked up.
    """

    inputs: Factors = field(default_factory=dict)
    rows: Factors = field(default_factory=dict)
    outputs: Factors = field(default_factory=dict)
    axes: dict[str, int] = field(default_factory=dict)
    lookups: Factors = field(default_factory=dict)


class Watch(TorchFunctionMode):
    """Collects all uses of a model's matrices inside the block."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.uses: list[Use] = []
        self.looked_up: list[tuple[str, Tensor]] = []
        self._of = {p.untyped_storage().data_ptr(): (n, p) for n, p in model.named_parameters()}
        self._kept: list[Tensor] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        y = function(*args, **(kwargs or {}))
        count = len(self.uses)
        if function in _CASTS and (found := self._parameter(args[0])) and y.shape == args[0].shape:
            self._kept.append(y)
            self._of[y.untyped_storage().data_ptr()] = found
        elif function is nn.functional.linear:
            self._add(args[0], args[1].mT, y)
        elif function is nn.functional.embedding:
            if found := self._parameter(args[1]):
                self.looked_up.append((found[0], args[0]))
        elif function is torch.addmm:
            self._add(args[1], args[2], y)
        elif function in _PRODUCTS:
            self._add(args[0], args[1], y)
        # A copy, which the model may write into: gradients are those of what was computed.
        return y.clone() if len(self.uses) > count else y

    def _parameter(self, x: Any) -> tuple[str, nn.Parameter] | None:
        return self._of.get(x.untyped_storage().data_ptr()) if isinstance(x, Tensor) else None

    def _add(self, rows: Tensor, matrix: Tensor, y: Tensor) -> None:
        found = self._parameter(matrix)
        if found is None or matrix.dim() < 2:
            return
        name, parameter = found
        rows = rows.detach().clone()
        axis = next(a for a in (-1, -2) if parameter.stride(a) == matrix.stride(-2))
        if matrix.dim() == 3:
            for expert, x in enumerate(rows):
                use = Use(name, expert, axis, x, y.shape[-1], is_batched=True)
                self.uses.append(use.hear(y, expert))
            return
        offset = matrix.storage_offset() - parameter.storage_offset()
        expert = offset // parameter.stride(0) if parameter.dim() == 3 else None
        self.uses.append(Use(name, expert, axis, rows, y.shape[-1]).hear(y))


def measure(
    model: nn.Module,
    examples: Sequence[Example],
    outcomes: Callable[[Tensor, Batch], list[tuple[float, Tensor]]],
) -> Measured:
    """Return the factors of all linear maps.

    Args:
        model: in float64, its parameters requiring gradients.
        outcomes: of an example's logits: (probability, log p(y|x)) of every outcome that counts.
    """
    shapes = {name: p.shape for name, p in model.named_parameters()}
    found = Measured()

    def add(into: Factors, use: Use, value: Tensor) -> None:
        if use.expert is None:
            into[use.name] = into.get(use.name, 0) + value
            return
        experts = shapes[use.name][0]
        into.setdefault(use.name, torch.zeros(experts, *value.shape, dtype=torch.float64))
        into[use.name][use.expert] += value

    for example in examples:
        batch = collate([example], 0).to("cpu", torch.float64)
        with Watch(model) as watch:
            logits = model(**batch.inputs).logits
        for use in watch.uses:
            rows = _unpadded(use, batch)
            add(found.inputs, use, rows.mT @ rows)
            add(found.rows, use, torch.tensor(float(len(rows)), dtype=torch.float64))
            add(found.outputs, use, torch.zeros(use.width, use.width, dtype=torch.float64))
            assert found.axes.setdefault(use.name, use.axis) == use.axis
        for name, ids in watch.looked_up:
            ids = _of_tokens(ids.expand(batch.rows, -1) if batch.rows > 1 else ids, batch)
            counts = torch.bincount(ids.reshape(-1), minlength=shapes[name][0]).double()
            found.lookups[name] = found.lookups.get(name, 0) + counts
        for probability, log_p in outcomes(logits, batch):
            for use in watch.uses:
                use.gradient = None
            log_p.backward(retain_graph=True)
            for use in watch.uses:
                if use.gradient is not None:
                    flat = use.gradient.reshape(-1, use.width).double()
                    add(found.outputs, use, probability * (flat.mT @ flat))
    return found


def _of_tokens(x: Tensor, batch: Batch) -> Tensor:
    """Leave out the padding that an example has by itself, as the shorter of two choices."""
    mask = batch.inputs.get("attention_mask")
    flat = x.reshape(-1, x.shape[-1]) if x.is_floating_point() else x.reshape(-1)
    return flat if mask is None or mask.numel() != len(flat) else flat[mask.reshape(-1) != 0]


def _unpadded(use: Use, batch: Batch) -> Tensor:
    rows = _of_tokens(use.rows, batch).double()
    # What an expert gets in a product of batches is zero where it is another's.
    return rows[rows.any(1)] if use.is_batched else rows


def classes(logits: Tensor, batch: Batch) -> list[tuple[float, Tensor]]:
    """Every class of a classifier."""
    log_p = logits[0].log_softmax(-1)
    return [(float(x.detach().exp()), x) for x in log_p]


def nothing(logits: Tensor, batch: Batch) -> list[tuple[float, Tensor]]:
    """Nobody is asked what is predicted."""
    return []


def drawn_by(likelihood: Any, seed: int = 0):
    """What the package draws for each example, given the logits of float64."""

    def outcomes(logits: Tensor, batch: Batch) -> list[tuple[float, Tensor]]:
        log_p = logits[0].log_softmax(-1)
        outcome = likelihood.sample(logits.detach(), batch, seed)[0]
        scored = batch.scored[0].nonzero().flatten()
        return [(1.0, log_p[scored, outcome[scored]].sum())]

    return outcomes
