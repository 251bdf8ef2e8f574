"""Fisher merging, slow and obvious: the definition of the recipe's parameters, in float64."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

Tensors = dict[str, torch.Tensor]


def scale(fishers: Tensors, names: Iterable[str]) -> float:
    values = torch.cat([fishers[name].double().flatten() for name in names])
    return math.sqrt(float((values**2).mean()))


def merge_tensor(
    thetas: Sequence[torch.Tensor],
    fishers: Sequence[torch.Tensor],
    lambdas: Sequence[float],
    scales: Sequence[float],
    *,
    floor: float = 1e-6,
    favor: int | None = None,
) -> torch.Tensor:
    """Return Σ wθ / Σ w with w = λ (F/s + floor); all of the floor goes to `favor`, if given."""
    top = torch.zeros_like(thetas[0], dtype=torch.float64)
    bottom = torch.zeros_like(top)
    for i, (theta, f, lam, s) in enumerate(zip(thetas, fishers, lambdas, scales, strict=True)):
        share = lam if favor is None else sum(lambdas) * (i == favor)
        weight = lam * f.double() / s + floor * share
        top += weight * theta.double()
        bottom += weight
    return top / bottom


def merge(
    models: Sequence[Tensors],
    fishers: Sequence[Tensors],
    lambdas: Sequence[float],
    names: Sequence[str],
    **options: object,
) -> Tensors:
    """Merge the named tensors of models that call them alike; each Fisher divided by its scale."""
    scales = [scale(f, names) for f in fishers]
    return {
        name: merge_tensor(
            [m[name] for m in models],
            [f[name] for f in fishers],
            lambdas,
            scales,
            **options,  # type: ignore[arg-type]
        )
        for name in names
    }
