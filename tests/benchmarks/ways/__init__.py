"""The ways to go over a batch that the benchmark compares: one file each, or a few of our own."""

from __future__ import annotations

from ways.base import Library, Unable, Way
from ways.kronfluence_diagonal import KronfluenceDiagonal
from ways.nngeometry_diagonal import NNGeometryDiagonal
from ways.opacus_squares import OpacusSquares
from ways.ours import Empirical, Fisher
from ways.plain import Loop, Step

WAYS: tuple[type[Way], ...] = (
    Step,
    Fisher,
    Empirical,
    Loop,
    KronfluenceDiagonal,
    OpacusSquares,
    NNGeometryDiagonal,
)
"""As the columns stand; the first is what all others are divided by."""

__all__ = ["WAYS", "Empirical", "Fisher", "Library", "Loop", "Step", "Unable", "Way"]
