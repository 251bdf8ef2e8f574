"""Random draws that depend on the seed and the example alone, not on its batch or padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Scatters neighbouring seeds: else seed 1 would draw for example 0 what seed 0 draws for example 1.
_MIX = 0x9E3779B97F4A7C15

SPAN = 256
"""Outcomes of a vocabulary that are looked at together first."""

OUTCOMES, MASKS, SIGNS = 0, 0x2545F4914F6CDD1D, 0x5851F42D4C957F2D
"""Streams of draws that know nothing of each other: outcomes, tokens to mask, signs."""


def uniforms(seed: int, examples: Sequence[int], length: int, stream: int = OUTCOMES) -> Tensor:
    """Return uniform numbers in [0, 1), `[b, length]` float64, a stream of its own an example."""
    rows = []
    for example in examples:
        mixed = ((seed + 1) * _MIX + example + stream) % (1 << 63)
        generator = torch.Generator().manual_seed(mixed)
        rows.append(torch.rand(length, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


def normals(seed: int, examples: Sequence[int], length: int) -> Tensor:
    """Return numbers of the standard normal distribution, `[b, length]` float64."""
    # Never infinite: the least number above zero that `uniforms` can give is 2^-53.
    uniform = uniforms(seed, examples, length).clamp_min(2.0**-54)
    normal: Tensor = torch.special.ndtri(uniform)
    return normal


def signs(seed: int, examples: Sequence[int], length: int) -> Tensor:
    """Return independent signs, +1 or −1, `[b, length]` float64."""
    return 1 - 2 * (uniforms(seed, examples, length, SIGNS) < 0.5).double()


def inverse_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Return the outcome k with cdf(k-1) <= u < cdf(k).

    Args:
        probabilities: `[n, k]`, rows that sum to one.
        uniform: `[n]` float64 in [0, 1).
    """
    u = uniform.to(probabilities.device)
    whole = probabilities.shape[1] // SPAN
    if whole < 2:
        return _draw(probabilities, u)[0]
    # A vocabulary is drawn from in two steps, a span of outcomes and one of the span: the running
    # sum of all of it in float64 would cost more than the softmax.
    spans = probabilities[:, : whole * SPAN].unflatten(1, (whole, SPAN)).sum(2)
    rest = probabilities[:, whole * SPAN :].sum(1, keepdim=True)
    span, u = _draw(torch.cat([spans, rest], 1), u)
    within = span[:, None] * SPAN + torch.arange(SPAN, device=u.device)
    inside = within < probabilities.shape[1]
    chosen = probabilities.gather(1, within.clamp_max(probabilities.shape[1] - 1)) * inside
    return span * SPAN + _draw(chosen, u)[0]


def _draw(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outcome, by weights `[n, k]`, and how far into it u is, again in [0, 1)."""
    cdf = weights.cumsum(-1, dtype=torch.float64)
    # Scaled by the last value: rounding must not leave a gap above the cdf.
    threshold = u[:, None] * cdf[:, -1:]
    outcome = torch.searchsorted(cdf, threshold, right=True).clamp_(max=cdf.shape[1] - 1)
    weight = weights.gather(1, outcome).double()
    into = (threshold - cdf.gather(1, outcome) + weight) / weight
    return outcome[:, 0], into[:, 0].clamp(0.0, 1 - 2.0**-52)
