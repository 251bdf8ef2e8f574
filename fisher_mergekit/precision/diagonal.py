"""Diagonal Cᵢ: the equation falls apart into one an element, a weighted mean.

Format: tensors of one shape and device, any floating dtype. Arithmetic is in float32, or in float64
where an input is float64.

What it costs is not the arithmetic but the way of the numbers to it: a model does not fit into a
processor's cache. So tensors are taken in blocks that stay in cache, and each weight is formed
there once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1 << 17
"""Elements that each thread of a CPU merges at once: 512 KiB of float32 a tensor, as measured. In
smaller blocks to begin an operation takes as long as the operation; larger ones go to memory and
back, for eight or nine of them are in use at a time."""
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
        terms: tensors, of the theta's shape, and their factors.
    """

    constant: float
    terms: tuple[tuple[Tensor, float], ...] = ()


class Former:
    """Forms a weight, block by block.

    float32 may be unable to hold a factor, such as the inverse of a Fisher's scale of 1e-39, when
    it can hold the product. A power of two is taken out first; multiplying by that is exact.

    Args:
        weight: what is formed.
        split: makes the blocks of a tensor.
        memory: of the dtype and device that is computed in.
    """

    def __init__(self, weight: Weight, split: Callable[[Tensor], Sequence[Tensor]], memory: Tensor):
        self._constant = weight.constant
        # Not a scalar, whose dtype would not count.
        self._start = memory.new_full((1,), weight.constant)
        self._terms: list[tuple[Sequence[Tensor], float, float]] = []
        for x, factor in weight.terms:
            exponent = math.frexp(factor)[1]
            power = math.ldexp(1.0, exponent // 2) if abs(exponent) >= 100 else 1.0
            self._terms.append((split(x), factor / power, power))

    def formed(self, number: int, memory: Tensor) -> float | Tensor:
        """Return a number, or a block of the tensor, written where there is memory for it."""
        if not self._terms:
            return self._constant
        found = self._start
        for blocks, factor, power in self._terms:
            x = blocks[number]
            if power != 1:
                x = x.to(memory.dtype) * power
            found = torch.add(found, x, alpha=factor, out=memory)
        return found


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

    def equations(self, result: Tensor, dtype: torch.dtype) -> Iterator[Blocks]:
        """Yield the same object once for each block: in the same memory, one after the other."""
        lengths = [len(block) for block in self.split(result)]
        size = max(lengths, default=0)
        memory = [result.new_empty(size, dtype=dtype) for _ in range(4)]
        formers = {i: Former(weight, self.split, memory[0]) for i, weight in self.weights.items()}
        positive = all(
            factor >= 0 for weight in self.weights.values() for _, factor in weight.terms
        ) and any(weight.constant >= torch.finfo(dtype).tiny for weight in self.weights.values())
        blocks = Blocks(formers, memory, positive=positive)
        for number, length in enumerate(lengths):
            if length < size:  # the last
                blocks = Blocks(formers, [row[:length] for row in memory], positive=positive)
            blocks.begin(number)
            yield blocks


class Blocks:
    """The equations of the elements of one block after the other.

    Args:
        formers: of all models' weights; the first one's counts from the start.
        memory: four tensors as long as a block, to compute in.
        positive: whether the sum of weights is known to be.
    """

    starts_at_mean = False

    def __init__(self, formers: Mapping[int, Former], memory: Sequence[Tensor], *, positive: bool):
        self._formers, self._positive = formers, positive
        self._memory, self._weight, self._difference, self._product = memory
        self._first = next(iter(formers.values()))

    def begin(self, number: int) -> None:
        """Take up a block."""
        self._number = number
        self._total = self._first.formed(number, self._memory)
        self._right: Tensor | None = None

    def add(self, index: int, theta: Tensor, reference: Tensor) -> None:
        """Add Wᵢ of one model to the sum, and Wᵢ (θᵢ − ρ) to the right side."""
        weight = self._formers[index].formed(self._number, self._weight)
        if isinstance(self._total, Tensor) or isinstance(weight, Tensor):
            self._total = torch.add(weight, self._total, out=self._memory)
        else:
            self._total += weight
        difference = torch.sub(theta, reference, out=self._difference)
        if self._right is None:
            self._right = torch.mul(difference, weight, out=self._product)
        elif isinstance(weight, Tensor):
            self._right.addcmul_(weight, difference)
        else:
            self._right.add_(difference, alpha=weight)

    def solve(self, reference: Tensor, out: Tensor, name: str = "") -> Tensor | None:
        """Write ρ + (Σ Wᵢ)⁻¹ times the right side; return where all weights are 0, if anywhere."""
        if self._right is None:  # one model alone
            out.copy_(reference)
            return None
        if not isinstance(self._total, Tensor):
            torch.add(reference, self._right.div_(self._total), out=out)
            return None
        torch.addcdiv(reference, self._right, self._total, out=out)
        return None if self._positive or self._total.amin() > 0 else self._total == 0
