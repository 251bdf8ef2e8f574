"""`fisher`: the diagonal Fisher, a tensor of squares for every parameter."""

from __future__ import annotations

from fisher_mergekit.measure.kinds import SQUARES, Measured, Stored

NEEDS = frozenset({SQUARES})


def stored(measured: Measured) -> Stored:
    """Return the squares under the names, and in the shapes, that the files have."""
    tensors = {
        name: tensor.to("cpu") for name, tensor in measured.subject.on_disk(measured.squares)
    }
    return Stored(tensors, weights=list(tensors))
