"""Where in a model its Fisher lies: its *mass*, the sum of its values, by layer and tensor type."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from fisher_mergekit.sidecar.reader import Sidecar

_EMBEDDING = ("embed", "wte", "wpe")

TYPES: dict[str, tuple[str, ...]] = {
    "norm": ("norm", "ln_"),
    "embedding": _EMBEDDING,
    "attention": ("attn", "attention", "q_lin", "k_lin", "v_lin", "out_lin"),
    "feed-forward": ("mlp", "ffn", "intermediate", "output.dense"),
}
"""Tensor types by parts of their names, the first that fits; the rest is `other`."""
EMBEDDING = "embedding"
OTHER = "other"

_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")


@dataclass(frozen=True)
class Mass:
    """Mass of one tensor, or of several together.

    Attributes:
        name: the tensor's name, or what the sum is of.
        layer: the layer's number, or None outside the layers.
        type: one of `TYPES`, or `other`.
        count: number of values.
        total: their sum.
        sum_of_squares: the sum of their squares.
    """

    name: str
    layer: int | None
    type: str
    count: int
    total: float
    sum_of_squares: float

    @property
    def place(self) -> str:
        """The layer's number; outside the layers `embedding` or `other`: final norms and heads."""
        if self.layer is not None:
            return str(self.layer)
        return EMBEDDING if is_embedding(self.name) else OTHER

    @property
    def mean(self) -> float:
        """The mean value."""
        return self.total / self.count

    @property
    def root_mean_square(self) -> float:
        """The scale that merging divides by, here of these values alone."""
        return math.sqrt(self.sum_of_squares / self.count)


def layer_of(name: str) -> int | None:
    """Return the layer number in a tensor's name, or None."""
    match = _LAYER.search(name)
    return int(match.group(1)) if match else None


def type_of(name: str) -> str:
    """Return a tensor's type by its name."""
    lower = name.lower()
    return next((t for t, parts in TYPES.items() if any(p in lower for p in parts)), OTHER)


def is_embedding(name: str) -> bool:
    """Return whether a tensor belongs to the embeddings, their norm included."""
    return any(part in name.lower() for part in _EMBEDDING)


def masses(sidecar: Sidecar) -> list[Mass]:
    """Return the mass of every measured tensor: embeddings, the layers in order, the rest.

    Reads each tensor once; raises SidecarError if one is corrupt.
    """
    found = []
    for name in sidecar:
        values = sidecar.load(name)
        found.append(
            Mass(
                name,
                layer_of(name),
                type_of(name),
                values.numel(),
                float(values.double().sum()),
                sidecar.sum_of_squares(name),
            )
        )
    return sorted(found, key=_order)


def _order(mass: Mass) -> tuple[int, int, str]:
    if mass.layer is not None:
        return 1, mass.layer, mass.name
    return (0 if is_embedding(mass.name) else 2), 0, mass.name


def together(parts: Iterable[Mass], name: str) -> Mass:
    """Return the mass of several tensors as one."""
    parts = list(parts)
    return Mass(
        name,
        None,
        OTHER,
        sum(part.count for part in parts),
        math.fsum(part.total for part in parts),
        math.fsum(part.sum_of_squares for part in parts),
    )
