"""Packed experts: all experts of a mixture in one 3-D parameter, a token going to few of them.

Rows (a token at one of its experts) are sorted by expert and, within an expert, by example. Then
every expert's product and every (expert, example) gradient is a product of neighbouring rows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fisher_mergekit.measure.axes import NoExamples
from fisher_mergekit.measure.contributions import Contribution, Scatter, Segments
from fisher_mergekit.measure.inputs import Inputs, Use
from fisher_mergekit.measure.layers.base import Layer, Unfit, own_parameters
from fisher_mergekit.measure.sites import Site

_MARKS = ("is_transposed", "has_bias", "has_gate", "has_post_expert_norm", "_apply_gate")
"""What `transformers.integrations.moe.use_experts_implementation` leaves on a module."""


@dataclass(frozen=True)
class _Route:
    """Which rows go where.

    Attributes:
        place: `[n]` where in `top_k_index`, which is in the order of tokens, each row stands; rows
            are sorted by expert, then example.
        expert: `[b, m]` expert of each of an example's rows, in the order of tokens.
        offsets: where each (expert, example) begins, and the end; `experts * b + 1` numbers.
        tokens: how many there are, each going to several experts.
    """

    place: Tensor
    expert: Tensor
    offsets: Sequence[int]
    tokens: int

    @property
    def examples(self) -> int:
        """How many examples the rows come from."""
        return len(self.expert)

    @property
    def spans(self) -> list[slice]:
        """Each expert's rows."""
        return [slice(a, b) for a, b in pairwise(self.starts)]

    @property
    def starts(self) -> Sequence[int]:
        """Where each expert's rows begin, and the end."""
        return self.offsets[:: self.examples]


class Experts(Layer):
    """Every module with `transformers`' interface of interchangeable expert implementations."""

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return (
            all(hasattr(module, mark) for mark in _MARKS)
            and not module.has_post_expert_norm
            and {name for name, _ in module.named_parameters()} == set(own_parameters(module))
        )

    def described(self, module: nn.Module) -> Collection[str]:
        return ("gate_up_proj", "up_proj", "down_proj")

    def call(self, site: Site, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 3 or kwargs or not all(isinstance(a, Tensor) for a in args):
            raise Unfit("it is not called with states, experts and weights")
        states, index, weights = args
        if site.layer.read(site.axes, 0, states) is None:
            raise NoExamples
        module: Any = site.module
        route = _route(index, experts=_count(module), examples=site.axes.examples)
        # Repeated and permuted, not looked up and added: sums in a fixed order, forward and back.
        x = states.repeat_interleave(index.shape[1], 0)[route.place]
        if module.has_gate:
            hidden = module._apply_gate(_linear(site, "gate_up_proj", x, route))
        else:
            hidden = module.act_fn(_linear(site, "up_proj", x, route))
        y = _linear(site, "down_proj", hidden, route)
        y = y * weights.reshape(-1)[route.place].unsqueeze(-1)
        of_token = y.new_zeros(index.numel(), y.shape[1]).index_copy(0, route.place, y)
        return of_token.view(*index.shape, -1).sum(1).to(states.dtype)


def _count(module: Any) -> int:
    return len(module.down_proj)


def _route(index: Tensor, *, experts: int, examples: int) -> _Route:
    tokens, choices = index.shape
    flat = index.reshape(-1)
    each = tokens // examples * choices
    example = torch.arange(len(flat), device=index.device) // each
    keys = flat * examples + example
    place = keys.argsort(stable=True)
    counts = torch.bincount(keys, minlength=experts * examples)[: experts * examples]
    offsets = [0, *counts.cumsum(0).tolist()]
    place = place[: offsets[-1]]  # an index of `experts` means: no expert
    return _Route(place, flat.view(examples, each), offsets, tokens)


def _linear(site: Site, name: str, x: Tensor, route: _Route) -> Tensor:
    """Send rows `[n, i]` through their experts' matrices; returns `[n, o]`."""
    module: Any = site.module
    weight = getattr(module, name)
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    matrix_eio = weight if module.is_transposed else weight.mT

    def forward(x: Tensor) -> Tensor:
        y = x.new_empty(len(x), matrix_eio.shape[2])
        for expert, span in enumerate(route.spans):
            torch.mm(x[span], matrix_eio[expert], out=y[span])
            if bias is not None:
                y[span] += bias[expert]
        return y

    def backward(saved: Sequence[Tensor], gradients: Sequence[Tensor]) -> Any:
        (x,), (gradient,) = saved, gradients
        x_gradient = torch.empty_like(x)
        for expert, span in enumerate(route.spans):
            torch.mm(gradient[span], matrix_eio[expert].T, out=x_gradient[span])
        rows, cols = (x, gradient) if module.is_transposed else (gradient, x)
        found: dict[str, Contribution] = {name: Segments(rows, cols, route.offsets)}
        if bias is not None:
            of_token = gradient.new_zeros(route.expert.numel(), gradient.shape[1])
            of_token[route.place] = gradient
            values = of_token.view(*route.expert.shape, -1).float()
            ids = route.expert.clamp_max(len(weight) - 1)  # rows of no expert have gradient 0
            found[f"{name}_bias"] = Scatter(ids, values)
        return [x_gradient], found

    use = Use(axis=-2 if module.is_transposed else -1, offsets=route.starts)
    token = route.place // (route.expert.numel() // route.tokens)
    inputs = {name: Inputs(x, use, token, route.tokens)}
    return site.tap(forward, backward, x, inputs=inputs)  # type: ignore[no-any-return]
