"""What limits measuring on a CPU: the product of each example alone, squared and added up.

    python tests/benchmarks/product.py [--threads 1] [--compile]

For matrices of MiniLM's shapes and 16 examples: seconds over those of the batch's one product, the
fastest of 20 turns. `alone` is what the package does, `batched` forms a block of all examples at
once; `compiled` is `alone` by `torch.compile` with all its tuning, and needs a C++ compiler.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from fisher_mergekit.measure.contributions import Product, add_squares

EXAMPLES, TURNS = 16, 20
ROWS = 256
"""Of a block of all examples; larger and smaller ones are slower or as fast."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = ["alone", "batched", *(["compiled"] if options.compile else [])]
    print("tokens  matrix       " + "".join(name.rjust(10) for name in names))
    for tokens in (16, 64, 128):
        for out, width in ((384, 384), (1536, 384), (384, 1536)):
            rows, cols = (torch.randn(EXAMPLES, tokens, n) for n in (out, width))
            total = torch.zeros(out, width)
            whole = fastest(lambda r=rows, c=cols: r.flatten(0, 1).T @ c.flatten(0, 1))
            ways: dict[str, Callable[[], object]] = {
                "alone": lambda t=total, r=rows, c=cols: add_squares(t, [Product(r, c)]),
                "batched": lambda t=total, r=rows, c=cols: batched(t, r, c),
            }
            if options.compile:
                one = torch.compile(squared, mode="max-autotune-no-cudagraphs")
                ways["compiled"] = lambda t=total, r=rows, c=cols, f=one: [
                    f(t, x.T, y) for x, y in zip(r, c, strict=True)
                ]
            ratios = "".join(f"{fastest(ways[name]) / whole:10.2f}" for name in names)
            print(f"{tokens:6}  {out:4} x {width:4}  {ratios}", flush=True)


def batched(total: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor) -> None:
    """Form a block of rows for all examples, square it, add it up."""
    for start in range(0, len(total), ROWS):
        block = torch.bmm(rows[:, :, start : start + ROWS].mT, cols)
        total[start : start + ROWS] += block.square_().sum(0)


def squared(total: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor) -> torch.Tensor:
    """Add one example's squared gradient."""
    gradient = rows @ cols
    return total.addcmul_(gradient, gradient)


def fastest(run: Callable[[], object]) -> float:
    """Return the seconds of the fastest turn; two are for warming up."""
    seconds = []
    for _ in range(TURNS + 2):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds[2:])


if __name__ == "__main__":
    main()
