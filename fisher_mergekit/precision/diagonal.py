"""Diagonal Cᵢ: the equation falls apart into one an element, a weighted mean.

Format: tensors of one shape and device, any floating dtype. Arithmetic is in float32, or in float64
where an input is float64.

What it costs is not the arithmetic but the way of the numbers to it: a model does not fit into a
processor's cache, and memory that was never used is slow to get. So tensors are taken in blocks
that stay in cache, and each weight is formed there once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

BLOCK = 1 << 17
"""Elements that each thread of a CPU merges at once: 512 KiB of float32 a tensor."""
BLOCK_ELSEWHERE = 1 << 24
"""On other devices, where what counts is how often a kernel is started."""


def working_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """Return the dtype that the merge computes in: float32, or float64 if any input has it."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def relative(lambdas: Sequence[float]) -> list[float]:
    """Return the lambdas divided by the largest: the merge is the same, the numbers are tame.

    Only their ratios count, but 1e300 would overflow and 1e-300 vanish in float32.
    """
    largest = max(lambdas)
    return [value / largest for value in lambdas]


def counting(lambdas: Sequence[float]) -> list[int]:
    """Return the indices of the models that are there: a lambda of 0 removes one."""
    return [i for i, value in enumerate(lambdas) if value != 0]


def weighted_mean(
    thetas: Sequence[Tensor], weights: Sequence[float], *, dtype: torch.dtype | None = None
) -> Tensor:
    """Return Σ wᵢ θᵢ / Σ wᵢ.

    The mean is taken of the differences from the first theta. That is the same value, but where
    all thetas agree it is exactly theirs, and in low precision nothing large cancels.

    Args:
        thetas: n tensors of one shape; borrowed, never written to.
        weights: n numbers whose sum is not zero.
        dtype: to compute in; None is the working dtype.

    Returns:
        A new tensor in that dtype.
    """
    dtype = dtype or working_dtype(thetas)
    reference = thetas[0].to(dtype)
    result = torch.zeros_like(reference)
    total = sum(weights)
    for theta, weight in zip(thetas[1:], weights[1:], strict=True):
        if weight != 0:
            result.add_(theta.to(dtype) - reference, alpha=weight / total)
    return result.add_(reference)


@dataclass(frozen=True)
class Weight:
    """A diagonal Wᵢ = λᵢ Cᵢ: constant + Σ factor · x.

    Attributes:
        constant: the same for all elements.
        terms: tensors, of one shape or a part of it, and their factors.
    """

    constant: float
    terms: tuple[tuple[Tensor, float], ...] = ()

    def __add__(self, other: Weight) -> Weight:
        return Weight(self.constant + other.constant, self.terms + other.terms)

    def formed(self, memory: Tensor) -> float | Tensor:
        """Return a number, or the tensor, written where there is memory for it.

        float32 may be unable to hold a factor, such as the inverse of a Fisher's scale of 1e-39,
        when it can hold the product. A power of two is taken out first; multiplying by that is
        exact.
        """
        if not self.terms:
            return self.constant
        memory.fill_(self.constant)
        for x, factor in self.terms:
            exponent = math.frexp(factor)[1]
            if abs(exponent) >= 100:
                power = math.ldexp(1.0, exponent // 2)
                x, factor = x.to(memory.dtype) * power, factor / power
            memory.add_(x, alpha=factor)
        return memory


@dataclass(frozen=True)
class Elementwise:
    """Σᵢ Wᵢ for diagonal Wᵢ.

    Attributes:
        weights: Wᵢ by the models' indices.
    """

    weights: Mapping[int, Weight]
    dtype: torch.dtype | None = None

    @property
    def models(self) -> list[int]:
        """Indices of the models that are in it."""
        return list(self.weights)

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """Return the blocks of a tensor, flat."""
        size = BLOCK * torch.get_num_threads() if tensor.device.type == "cpu" else BLOCK_ELSEWHERE
        return tensor.reshape(-1).split(size) if tensor.numel() else ()

    def equations(self, result: Tensor, dtype: torch.dtype) -> Iterator[Block]:
        """Yield one for each block; all of them use the same memory, one after the other."""
        blocks = self.split(result)
        parts = {x: self.split(x) for w in self.weights.values() for x, _ in w.terms}
        memory = result.new_empty((4, len(blocks[0]) if blocks else 0), dtype=dtype)
        for number, block in enumerate(blocks):
            weights = {
                i: replace(w, terms=tuple((parts[x][number], factor) for x, factor in w.terms))
                for i, w in self.weights.items()
            }
            yield Block(weights, memory[:, : len(block)])


class Block:
    """The equations of some elements.

    Args:
        weights: all models' there.
        memory: `[4, elements]`, to compute in.
    """

    def __init__(self, weights: Mapping[int, Weight], memory: Tensor):
        self._weights = weights
        total, self._weight, self._difference, self._right = memory
        self._total = sum(weights.values(), Weight(0.0)).formed(total)
        self._right.zero_()
        self.is_regular = not isinstance(self._total, Tensor) or bool(self._total.amin() > 0)

    def add(self, index: int, theta: Tensor, reference: Tensor) -> None:
        """Add Wᵢ (θᵢ − ρ) of one model to the right side."""
        difference = torch.sub(theta, reference, out=self._difference)
        weight = self._weights[index].formed(self._weight)
        if isinstance(weight, Tensor):
            self._right.addcmul_(weight, difference)
        else:
            self._right.add_(difference, alpha=weight)

    def solve(self, name: str = "") -> Tensor:
        """Return (Σ Wᵢ)⁻¹ times the right side, zero where all weights are."""
        found: Tensor = self._right.div_(self._total)
        if isinstance(self._total, Tensor) and not self.is_regular:
            found.masked_fill_(self._total == 0, 0)
        return found
