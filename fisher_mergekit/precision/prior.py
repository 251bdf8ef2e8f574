r"""Kind `prior`: Cᵢ = F₀ + Fᵢ, the base model's own diagonal Fisher as a prior for every model.

A fine-tuned model's posterior has the base's in it, because that is what its training began with:
its precision is F₀ + Fᵢ, and in a product of n posteriors the prior is to count once, not n times
(Daheim et al. 2023, arXiv 2310.12808):

    θ* = θ₀ + (F₀ + Σᵢ λᵢ Fᵢ)⁻¹ Σᵢ λᵢ (F₀ + Fᵢ) (θᵢ − θ₀)

It is the one equation, with the base itself as one more model of precision F₀ and lambda
λ₀ = 1 − Σᵢ λᵢ. So the lambdas are absolute here: they say how much of each model is added to the
base, and may sum to more than one.

Fishers are divided by their scales, F₀ by its own, and the floor is the least prior: where no model
and not even the base knows anything, the result is the mean with λ₀, task arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from fisher_mergekit.precision.diagonal import Elementwise, Weight, counting
from fisher_mergekit.precision.fisher import FLOOR, common_scale, visible


def with_base(lambdas: Sequence[float]) -> tuple[float, ...]:
    """Return the lambdas, and behind them the base's."""
    return (*lambdas, 1 - math.fsum(lambdas))


def system(
    precisions: Sequence[tuple[Tensor, ...]],
    lambdas: Sequence[float],
    *,
    scales: Sequence[float],
    normalize_fishers: bool = True,
    floor: float = FLOOR,
) -> Elementwise:
    """Return F₀/s₀ + floor + Σ λᵢ Fᵢ/sᵢ, as the sum over models and base.

    Args:
        precisions: one Fisher a model, and the base's behind them.
        lambdas: the models', and the base's behind them: `with_base`.
        scales: likewise, positive.
        normalize_fishers: divide each Fisher by its own scale; otherwise all by one common scale.
        floor: relative to the scale.
    """
    base = len(lambdas) - 1
    present = counting(lambdas)
    unit = max(1.0, floor, *map(abs, lambdas))  # only ratios count, and they are not to overflow
    floor = visible(floor)
    if not normalize_fishers:
        scales = [common_scale([scales[i] for i in {*present, base}])] * len(scales)

    def weight(i: int) -> Weight:
        factor = lambdas[i] / unit
        known = [(precisions[j][0], factor / scales[j]) for j in dict.fromkeys((base, i))]
        return Weight(factor * floor, tuple(known))

    return Elementwise({i: weight(i) for i in present})
