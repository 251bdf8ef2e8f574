"""How large a batch may be: a number of examples, or with `batch_size: auto` a number of tokens.

What a batch costs goes by its tokens: a fixed number of examples wastes time on short ones and
memory on long ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal

import torch

from fisher_mergekit.measure.batches import Batch, Example

BatchSize = int | Literal["auto"]

CPU_TOKENS = 1024
"""On MiniLM a token's time falls up to here (by 37 % from 64 tokens, 20 % from 256), and with four
times as many it changes by 4 to 7 % either way, for four times the memory."""
GPU_TOKENS = 16384
"""Matrices keep a large GPU busy from some thousand rows on. It is less where memory runs out."""
NUMBERS_A_TOKEN = 16 * 16 * 3
"""Numbers of a picture or sound for which a model usually computes one token: a patch."""


@dataclass(frozen=True)
class Limit:
    """The most that a batch may have; one example is always allowed.

    Attributes:
        examples: how many; infinite if only tokens count.
        tokens: padding included; None if only examples count.
    """

    examples: float
    tokens: int | None = None

    @classmethod
    def of(cls, batch_size: BatchSize, device: torch.device) -> Limit:
        """Return what a recipe's `batch_size` means on a device."""
        if batch_size == "auto":
            return cls(inf, CPU_TOKENS if device.type == "cpu" else GPU_TOKENS)
        return cls(batch_size)

    def count(self, longest: Example) -> int:
        """Return how many examples go into a batch, none of them longer than this one."""
        fitting = inf if self.tokens is None else self.tokens // _tokens(longest)
        return int(max(1, min(self.examples, fitting)))

    def at_most(self, examples: float) -> Limit:
        """Return the limit with no more than so many examples."""
        return Limit(min(self.examples, examples), self.tokens)

    def halved(self, batch: Batch) -> Limit | None:
        """Return one with half of this batch's tokens; None if it may not or cannot be halved."""
        if self.tokens is None or len(batch) == 1:
            return None
        return Limit(self.examples, len(batch) // 2 * max(map(_tokens, batch.examples)))


def _tokens(example: Example) -> int:
    numbers = sum(x.numel() for x in example.inputs.values() if x.is_floating_point())
    return len(example) + numbers // NUMBERS_A_TOKEN
