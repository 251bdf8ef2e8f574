"""Where in a model its precision lies: its *mass*, by layer and tensor type.

The mass of a weight is the sum of its precision's diagonal: of a Fisher's values; of a product of
factors, the trace of the one times the trace of the other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from fisher_mergekit.sidecar.reader import Sidecar
from fisher_mergekit.study.factors import Factor

_EMBEDDING = ("embed", "wte", "wpe")

TYPES: dict[str, tuple[str, ...]] = {
    "norm": ("norm", "ln_"),
    "embedding": _EMBEDDING,
    "attention": ("attn", "attention", "q_lin", "k_lin", "v_lin", "out_lin"),
    "feed-forward": ("mlp", "ffn", "intermediate", "output.dense", "moe", "expert"),
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
        count: number of values: one for each element of the weight.
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
        return place_of(self.name)

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


def place_of(name: str) -> str:
    """Return a tensor's layer number; outside the layers `embedding` or `other`."""
    layer = layer_of(name)
    if layer is not None:
        return str(layer)
    return EMBEDDING if is_embedding(name) else OTHER


def label_of(place: str) -> str:
    """Return how tables call a place."""
    return f"layer {place}" if place.isdigit() else place


def type_of(name: str) -> str:
    """Return a tensor's type by its name."""
    lower = name.lower()
    return next((t for t, parts in TYPES.items() if any(p in lower for p in parts)), OTHER)


def is_embedding(name: str) -> bool:
    """Return whether a tensor belongs to the embeddings, their norm included."""
    return any(part in name.lower() for part in _EMBEDDING)


def masses(sidecar: Sidecar) -> list[Mass]:
    """Return the mass of every tensor of a Fisher: embeddings, the layers in order, the rest.

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
    return sorted(found, key=lambda mass: order(mass.name))


def factor_masses(sidecar: Sidecar, factors: Mapping[str, Factor]) -> list[Mass]:
    """Return the mass of every weight that factors describe, in the same order.

    Args:
        sidecar: whose.
        factors: as read from it.
    """
    found = []
    for name, record in sidecar.measurement.factors.items():
        count = math.prod(sidecar.measurement.weights[name].shape)
        inputs = factors[record.inputs].diagonal
        # Outputs that are not stored are the identity.
        ones = inputs.new_ones(len(inputs), count // inputs.numel())
        outputs = ones if record.outputs is None else factors[record.outputs].diagonal
        total = _sums(inputs) @ _sums(outputs)
        squares = _sums(inputs.square()) @ _sums(outputs.square())
        found.append(Mass(name, layer_of(name), type_of(name), count, float(total), float(squares)))
    return sorted(found, key=lambda mass: order(mass.name))


def _sums(diagonal: Tensor) -> Tensor:
    return diagonal.sum(-1)


def order(name: str) -> tuple[int, int, str]:
    """Return a sort key: embeddings, the layers in order, the rest."""
    layer = layer_of(name)
    if layer is not None:
        return 1, layer, name
    return (0 if is_embedding(name) else 2), 0, name


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
