"""Any module: run it again for each example alone, and let autograd find its parameters' gradients.

This is the rule for what no other rule describes: parameters that stand in a module by themselves
(a class token, a router, a state space's decay), modules of several tensors, tables that are looked
up once for all examples. Only this one module runs again, not the model. Its children are tapped by
themselves and run plainly here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from fisher_mergekit.measure.axes import ROWS, SHARED, NoExamples
from fisher_mergekit.measure.contributions import Contribution, Vector
from fisher_mergekit.measure.layers.base import Layer, Unfit
from fisher_mergekit.measure.sites import Site

MOST_ELEMENTS = 1 << 24
"""Of one parameter's gradients of all examples of a batch: 64 MiB."""


class Local(Layer):
    """A module that treats its examples separately, whatever it does with each of them."""

    def call(self, site: Site, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        readings = {i: site.layer.read(site.axes, i, leaves[i]) for i in places}
        if not any(reading not in (None, SHARED) for reading in readings.values()):
            raise NoExamples
        if site.axes.examples > self.most_examples(site.parameters):
            raise Unfit("it is too large to be held once for each example")
        outputs, out_spec = tree_flatten(site.forward(*args, **kwargs))
        tapped = [
            i for i, y in enumerate(outputs) if isinstance(y, Tensor) and y.is_floating_point()
        ]
        for i in tapped:
            if site.axes.rows > 1 and ROWS not in site.axes.readings(outputs[i]):
                outputs[i] = site.spread(outputs[i])
                site.axes.by_example(outputs[i])
        inputs = [leaves[i] for i in places]
        # Not the tensors themselves, which a checkpointed layer must be able to let go.
        others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

        def backward(saved: Sequence[Tensor], gradients: Sequence[Tensor]) -> Any:
            given = dict(zip(places, saved, strict=True))

            def alone(example: int) -> Any:
                parts = [
                    site.axes.part(given[i].detach(), example, readings[i]) if i in given else leaf
                    for i, leaf in enumerate(others)
                ]
                return tree_unflatten(parts, spec)

            scores = [
                [site.axes.part(g, example, ROWS) for g in gradients]
                for example in range(site.axes.examples)
            ]
            rows = [_gradients(site, alone(b), tapped, score) for b, score in enumerate(scores)]
            # The children's own taps have been passed already: what comes in goes out.
            return gradients, _stacked(site.parameters, rows)

        passed = site.tap(
            lambda *ys: tuple(y.view_as(y) for y in ys),
            backward,
            *[outputs[i] for i in tapped],
            saved=inputs,
        )
        for i, y in zip(tapped, passed, strict=True):
            outputs[i] = y
        return tree_unflatten(outputs, out_spec)

    def most_examples(self, parameters: Mapping[str, nn.Parameter]) -> float:
        return MOST_ELEMENTS // max(p.numel() for p in parameters.values())

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return False  # it is chosen where no other rule is


def _gradients(
    site: Site,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    tapped: list[int],
    scores: list[Tensor],
) -> list[Tensor | None]:
    """Return one example's gradients of the site's parameters."""
    args, kwargs = call
    with torch.enable_grad():
        leaves = {n: p.detach().requires_grad_() for n, p in site.parameters.items()}
        outputs = tree_flatten(functional_call(site.module, leaves, args, kwargs))[0]
        pairs = [(outputs[i], s) for i, s in zip(tapped, scores, strict=True)]
        pairs = [(y, s) for y, s in pairs if y.requires_grad]
        if not pairs:
            return [None] * len(leaves)
        return list(
            torch.autograd.grad(
                [y for y, _ in pairs],
                list(leaves.values()),
                [s.reshape(y.shape) for y, s in pairs],
                allow_unused=True,
            )
        )


def _stacked(
    parameters: Mapping[str, nn.Parameter], rows: list[list[Tensor | None]]
) -> dict[str, Contribution]:
    """Return `[b, *shape]` of each parameter that any example used."""
    found: dict[str, Contribution] = {}
    for place, (name, parameter) in enumerate(parameters.items()):
        column = [row[place] for row in rows]
        if any(g is not None for g in column):
            values = [torch.zeros_like(parameter) if g is None else g for g in column]
            found[name] = Vector(torch.stack(values))
    return found
