"""Where the examples are in a tensor.

Most tensors in a model have the examples first, `[b, …]`. Others have several rows of one example
after each other: a multiple choice (`[b c, t, …]`), a router that looks at all tokens at once
(`[b t, d]`), the patches of equally large images (`[b p, d]`). One row alone holds for all
examples, like positions `[1, t]`. How a tensor is read can be a coincidence in one batch, so a
reading is settled while the rules are verified, and has to fit in every batch after that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from fisher_mergekit.measure.batches import Batch

ROWS = "rows"
"""One row an example (or a choice)."""
SHARED = "shared"
"""One row for all examples."""

AxisReading: TypeAlias = str | tuple[str, int]
"""`ROWS`, `SHARED`, or (name of an input, n): n > 0 for n rows an entry of that input, n < 0 for
one row each |n| entries."""


class NoExamples(Exception):
    """A tensor has no axis of examples, or not the one that was settled."""


@dataclass(frozen=True)
class Axes:
    """The examples of one batch.

    Attributes:
        examples: how many, b.
        rows: rows that the model is called with, `b` or `b c`.
        sizes: entries of each input over the whole batch, `b t` for token ids, for inputs that have
            as many in every example.
    """

    examples: int
    rows: int
    sizes: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: Batch) -> Axes:
        """Return where the examples can be; an input counts if all have equally much of it."""
        sizes = {}
        for name, x in batch.inputs.items():
            if not x.is_floating_point() and x.dim() > 1:
                sizes[name] = x.numel()
            elif len({len(example.inputs[name]) for example in batch.examples}) == 1:
                sizes[name] = len(x)
        return cls(len(batch), batch.rows, sizes)

    def readings(self, x: Tensor) -> list[AxisReading]:
        """Return all that a tensor's first axis can be, the likeliest first."""
        if x.dim() == 0:
            return []
        n = len(x)
        found: list[AxisReading] = []
        if n == self.rows:
            found.append(ROWS)
        if n == 1:
            found.append(SHARED)
        for name, size in self.sizes.items():
            if n and n % self.examples == 0:
                if n % size == 0:
                    found.append((name, n // size))
                elif size % n == 0:
                    found.append((name, -(size // n)))
        return found

    def by_example(self, x: Tensor) -> Tensor:
        """View `[b k, …]` as `[b, k, …]`, and `[b, …]` as it is.

        Raises:
            NoExamples: the first axis cannot be shared out.
        """
        if x.dim() == 0 or len(x) % self.examples or not len(x):
            raise NoExamples
        if len(x) == self.examples:
            return x
        return x.reshape(self.examples, len(x) // self.examples, *x.shape[1:])

    def part(self, x: Tensor, example: int, reading: AxisReading | None) -> Tensor:
        """Return what one example alone would have; None reads a tensor as a constant."""
        if reading is None or reading == SHARED:
            return x
        share = len(x) // self.examples
        return x[example * share : (example + 1) * share]
