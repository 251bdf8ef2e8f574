"""Random draws that depend on the seed and the example alone, not on its batch or padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Scatters neighbouring seeds: else seed 1 would draw for example 0 what seed 0 draws for example 1.
_MIX = 0x9E3779B97F4A7C15


def uniforms(seed: int, examples: Sequence[int], length: int) -> Tensor:
    """Return uniform numbers in [0, 1), `[b, length]` float64, a stream of its own an example."""
    rows = []
    for example in examples:
        mixed = ((seed + 1) * _MIX + example) % (1 << 63)
        generator = torch.Generator().manual_seed(mixed)
        rows.append(torch.rand(length, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


def inverse_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Return the outcome k with cdf(k-1) <= u < cdf(k).

    Args:
        probabilities: `[n, k]`, rows that sum to one.
        uniform: `[n]` float64 in [0, 1).
    """
    cdf = probabilities.cumsum(-1, dtype=torch.float64)
    # Scaled by the last value: rounding must not leave a gap above the cdf.
    threshold = uniform.to(cdf.device)[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, threshold, right=True)[:, 0].clamp_(max=cdf.shape[1] - 1)
