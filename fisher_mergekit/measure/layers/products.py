"""A module that multiplies by its own matrix without a module for it: routers, projectors.

`F.linear(x, self.weight)` and `x @ self.weight` are looked for in what the module computes, and
each is tapped as a linear layer is. All else that the module does is left to autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fisher_mergekit.measure.axes import NoExamples
from fisher_mergekit.measure.contributions import Contribution, Product, Vector
from fisher_mergekit.measure.inputs import Inputs, Use
from fisher_mergekit.measure.layers.base import Layer, own_parameters, tokens
from fisher_mergekit.measure.sites import Site

_PRODUCTS = frozenset({torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm})
_SUMS = frozenset({torch.add, Tensor.add, Tensor.__add__})
_TRANSPOSES = frozenset({Tensor.t, torch.t, Tensor.T.__get__, Tensor.mT.__get__})  # type: ignore[attr-defined]
_CASTS = frozenset({Tensor.to, Tensor.type, Tensor.type_as, Tensor.float})


class Products(Layer):
    """Modules that own matrices, and whose children own none."""

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        below = (p for child in module.children() for p in child.parameters())
        return (
            not isinstance(module, nn.Embedding)
            and type(module).forward is not nn.Linear.forward
            and len(_matrices(module)) > 0
            and all(p.dim() < 2 for p in below)
        )

    def described(self, module: nn.Module) -> Collection[str]:
        return _matrices(module)

    def call(self, site: Site, *args: Any, **kwargs: Any) -> Any:
        with _Products(site):
            return site.forward(*args, **kwargs)


def _matrices(module: nn.Module) -> list[str]:
    return [name for name, p in own_parameters(module).items() if p.dim() == 2]


class _Products(TorchFunctionMode):
    """Taps a site's products, and sums with its vectors, inside the block."""

    def __init__(self, site: Site):
        super().__init__()
        self._site = site
        self._taps = 0
        # By identity, as a parameter, its transpose or its cast: name, whether transposed, itself.
        self._known = {id(p): (name, False, p) for name, p in _held(site).items()}

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        own = [self._known.get(id(x)) for x in args]
        if func is nn.functional.linear and own[1] is not None:
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            known = self._known.get(id(bias))
            name, is_transposed, weight = own[1]
            return self._product(name, args[0], weight.mT, not is_transposed, bias, known)
        if func in _PRODUCTS and own[1] is not None and args[1].dim() == 2:
            name, is_transposed, matrix = own[1]
            return self._product(name, args[0], matrix, is_transposed)
        if func in _SUMS and own[1] is not None and args[1].dim() == 1 and not kwargs:
            return self._sum(own[1][0], *args)
        y = func(*args, **kwargs)
        if own and own[0] is not None:
            name, is_transposed, _ = own[0]
            if func in _TRANSPOSES:
                self._known[id(y)] = (name, not is_transposed, y)
            elif func in _CASTS:
                self._known[id(y)] = (name, is_transposed, y)
        return y

    def _product(
        self,
        name: str,
        x: Tensor,
        matrix_io: Tensor,
        is_transposed: bool,
        bias: Tensor | None = None,
        known_bias: tuple[str, bool, Tensor] | None = None,
    ) -> Any:
        """Return x times a matrix: a parameter `[o, i]` transposed, or a parameter `[i, o]`."""

        def forward(x: Tensor) -> Tensor:
            y = nn.functional.linear(x, matrix_io.mT, bias)
            return y

        def contributions(x: Tensor, gradient: Tensor) -> dict[str, Contribution]:
            given, back = tokens(x), tokens(gradient)
            rows, cols = (back, given) if is_transposed else (given, back)
            found: dict[str, Contribution] = {name: Product(rows, cols)}
            if known_bias is not None:
                found[known_bias[0]] = Vector(back.float().sum(1))
            return found

        inputs = {name: lambda x: Inputs(x, Use(axis=-1 if is_transposed else -2))}
        return self._tap(x, forward, lambda g: g @ matrix_io.mT, contributions, inputs)

    def _sum(self, name: str, x: Tensor, vector: Tensor) -> Any:
        def contributions(x: Tensor, gradient: Tensor) -> dict[str, Contribution]:
            return {name: Vector(tokens(gradient).float().sum(1))}

        return self._tap(x, lambda x: x + vector, lambda g: g, contributions, {})

    def _tap(
        self,
        given: Tensor,
        forward: Callable[[Tensor], Tensor],
        back: Callable[[Tensor], Tensor],
        contributions: Callable[[Tensor, Tensor], dict[str, Contribution]],
        inputs: Mapping[str, Callable[[Tensor], Inputs]],
    ) -> Any:
        site = self._site
        if site.layer.read(site.axes, self._taps, given) is None:
            raise NoExamples
        self._taps += 1
        x = site.spread(given)

        def backward(saved: Any, gradients: Any) -> Any:
            parts = (site.axes.by_example(z) for z in (saved[0], gradients[0]))
            return [back(gradients[0])], contributions(*parts)

        seen = {name: make(x) for name, make in inputs.items()}
        return site.tap(forward, backward, x, inputs=seen, given=given)


def _held(site: Site) -> dict[str, Tensor]:
    """Return the tensors to be measured that the module itself holds under their names."""
    return {name: p for name, p in site.parameters.items() if "." not in name}
