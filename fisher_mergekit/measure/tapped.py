"""A module that is tapped: its rule, what is measured there, and its forward method meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from fisher_mergekit.measure.axes import Axes, AxisReading, NoExamples
from fisher_mergekit.measure.layers.base import Layer


@dataclass(eq=False)
class TappedLayer:
    """A module, its rule, and what is measured there.

    Attributes:
        name: the module's, in the model.
        parameters: by name relative to the module.
        calls: in the last forward pass.
        readings: how the first axis of each input was read while the rules were verified.
        settled: verified; from now on a reading has to fit those.
        is_spread: the rule made a row an example of one row for all of them.
    """

    name: str
    module: nn.Module
    rule: Layer
    parameters: dict[str, nn.Parameter]
    calls: int = 0
    readings: dict[int, list[set[AxisReading]]] = field(default_factory=dict)
    settled: bool = False
    is_spread: bool = False
    original: Any = field(init=False)
    forward: Callable[..., Any] = field(init=False)

    def __post_init__(self) -> None:
        forward = self.module.__dict__.get("forward")
        if isinstance(forward, Tapped):  # another rule's, which this one follows
            self.original, self.forward = forward.layer.original, forward.layer.forward
        else:
            self.original, self.forward = forward, self.module.forward

    def read(self, axes: Axes, place: int, x: Tensor) -> AxisReading | None:
        """Return what an input's first axis is; None for a tensor that all examples share whole.

        Raises:
            NoExamples: it is none of what it was while the rules were verified.
        """
        found = axes.readings(x)
        if not self.settled:
            self.readings.setdefault(place, []).append(set(found))
            return found[0] if found else None
        for known in self.readings.get(place, ()):
            for reading in found:
                if reading in known:
                    return reading
            if not known:
                return None
        raise NoExamples


class Caller(Protocol):
    """Who runs tapped modules."""

    def call(self, layer: TappedLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a module by its rule."""
        ...


@dataclass(frozen=True)
class Tapped:
    """The forward method that a tapped module has meanwhile."""

    taps: Caller
    layer: TappedLayer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module by its rule."""
        return self.taps.call(self.layer, args, kwargs)


@contextmanager
def installed(caller: Caller, layers: Iterable[TappedLayer]) -> Iterator[None]:
    """Let the layers' modules be run by somebody else inside the block."""
    chosen = list(layers)
    for layer in chosen:
        layer.module.forward = Tapped(caller, layer)
    try:
        yield
    finally:
        for layer in chosen:
            if layer.original is None:
                del layer.module.forward
            else:
                layer.module.forward = layer.original
