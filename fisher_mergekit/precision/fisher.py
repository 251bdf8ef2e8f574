r"""Kind `fisher`: Cᵢ is the diagonal of model i's Fisher information.

    θ*ⱼ = Σᵢ λᵢ Fᵢⱼ θᵢⱼ / Σᵢ λᵢ Fᵢⱼ            (Matena & Raffel 2021, arXiv 2111.09832, eq. 4)

Two models' Fishers can differ in scale by orders of magnitude, and the larger would then simply
win. So each is first divided by its scale sᵢ, the root mean square of Fᵢ over all merged
parameters. (The paper's release divides by the norm, √P times as large for all models alike: the
same merge.) Below a floor, relative to that scale, nobody is said to know anything:

    wᵢⱼ = λᵢ (Fᵢⱼ / sᵢ + floor)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fisher_mergekit.precision.diagonal import Elementwise, Weight, relative
from fisher_mergekit.precision.statistics import Statistics

STATISTICS = Statistics(squares=True)

FLOOR = 1e-6
"""Default floor, relative to the root mean square of a Fisher over the merged parameters."""


def root_mean_square(sum_of_squares: float, count: int) -> float:
    """Return the scale of a Fisher whose `count` values have this sum of squares."""
    return math.sqrt(sum_of_squares / count)


def common_scale(scales: Sequence[float]) -> float:
    """Return the one scale that stands for all models when Fishers are not normalised.

    One divisor for all models changes no ratio between them; it only gives the floor its unit.
    """
    return math.sqrt(math.fsum(scale * scale for scale in scales) / len(scales))


def system(
    precisions: Sequence[tuple[Tensor, ...]],
    lambdas: Sequence[float],
    *,
    scales: Sequence[float],
    normalize_fishers: bool = True,
    floor: float = FLOOR,
    favor: int | None = None,
) -> Elementwise:
    """Return Σ λᵢ (Fᵢ / sᵢ + floor).

    Args:
        precisions: n times one Fisher, a non-negative tensor of the theta's shape.
        lambdas: n non-negative numbers, not all zero. A model with lambda 0 is not there.
        scales: each model's root mean square over all merged parameters, positive.
        normalize_fishers: divide each Fisher by its own scale; otherwise all by one common scale.
        floor: relative to the scale. Where every Fisher is 0 the result is the lambda-weighted
            mean, for any floor, 0 included.
        favor: index of the model that gets all of the floor, so that where nobody knows anything
            its value stays; `None` shares the floor by lambda.
    """
    lambdas = relative(lambdas)
    floor = visible(floor)
    unit = max(1.0, floor)  # only ratios count, and a huge floor would overflow
    total = math.fsum(lambdas)
    present = [i for i, value in enumerate(lambdas) if value > 0 or (i == favor and floor > 0)]
    if not normalize_fishers:
        scales = [common_scale([scales[i] for i in present])] * len(scales)

    def weight(i: int) -> Weight:
        (values,) = precisions[i]
        share = lambdas[i] if favor is None else total * (i == favor)
        return Weight(floor / unit * share, ((values, lambdas[i] / scales[i] / unit),))

    return Elementwise({i: weight(i) for i in present})


def visible(floor: float) -> float:
    """Return the floor, or 0 for one so small that it would vanish in float32, unnoticed."""
    return floor if floor >= torch.finfo(torch.float32).tiny else 0.0
