"""What a Fisher loses when the model computes in bfloat16 or float16, against float32.

    python tests/benchmarks/precision.py [--models minilm smollm2] [--examples 64]

A CPU without bfloat16 and float16 of its own multiplies their matrices up to a hundred times slower
than float32's: SmolLM2 is measured on an eighth of the examples.

One table a model: MiniLM after a few steps on headlines (exact), and SmolLM2-135M on a genre of the
Brown corpus (empirical, and sampled, whose draws can differ too). The same examples, batches and
seed for each dtype; the accumulators are float32 always. For each kind of tensor: the relative
error ‖F − F32‖ / ‖F32‖ and Spearman's rank correlation over all numbers that are not zero in both,
the median over the tensors of that kind and the worst of them. The bias of attention keys shifts
all scores alike, so its Fisher is zero on paper and has no digits to compare. Needs the `demo`
extra, and for SmolLM2 pip and npm.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from models import read
from real import language, texts
from real.specialists import run

from fisher_mergekit.study.finetune import finetune
from fisher_mergekit.study.tasks import Sizes, headlines, minilm

DTYPES = ("float32", "bfloat16", "float16")

ZERO = 1e-12
"""Root mean square, relative to the largest tensor's, of what is float32's rounding of zero."""


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            MODELS[name](Path(folder) / name, arguments.examples)


def minilm_on_headlines(folder: Path, count: int) -> None:
    task = headlines(Sizes(480, 0, count))
    finetune(minilm(), task, folder, learning_rate=1e-4, max_length=48, quiet=True)
    task.held_out.write_jsonl(folder / "data.jsonl")
    report("MiniLM, headlines", folder, "exact", "--label", "label")


def smollm2_on_prose(folder: Path, count: int) -> None:
    language.save_base(folder)
    genre = texts.genre("learned", "j", train=count // 8, held_out=0)
    language.write_jsonl(genre.train, folder / "data.jsonl")
    for estimator in ("empirical", "sampled"):  # the same tokens, and those that each dtype draws
        report("SmolLM2-135M, learned prose", folder, estimator)


MODELS = {"minilm": minilm_on_headlines, "smollm2": smollm2_on_prose}


def report(title: str, folder: Path, estimator: str, *flags: str) -> None:
    """Measure in each dtype; print how far the others are from float32."""
    fishers, seconds = {}, {}
    for dtype in DTYPES:
        start = time.perf_counter()
        out = folder / f"{estimator}-{dtype}"
        said = run(
            "mergekit-fisher", "precompute", "--model", folder, "--path", folder / "data.jsonl",
            "--text", "text", "--estimator", estimator, "--dtype", dtype, "--out", out,
            "--max-length", 48, "--batch-size", 8, "-j", torch.get_num_threads(), *flags,
        )  # fmt: skip
        seconds[dtype] = time.perf_counter() - start
        fishers[dtype] = read(out)
        slow = said.count("one example at a time")
        if slow:
            print(f"{dtype}: {slow} tensors were measured one example at a time")
    exact = fishers["float32"]
    print(f"\n{title}, {estimator}; seconds:", end=" ")
    print(", ".join(f"{dtype} {value:.0f}" for dtype, value in seconds.items()))
    largest = max(rms(value) for value in exact.values())
    zero = [name for name, value in exact.items() if rms(value) < ZERO * largest]
    kinds = defaultdict(list)
    for name in exact.keys() - zero:
        kinds[re.sub(r"\.\d+\.", ".*.", name)].append(name)
    heading = f"{'error (worst)':>16}  {'rank (worst)':>14}"
    print(f"{'':54}  " + "  ".join(f"{dtype:>32}" for dtype in DTYPES[1:]))
    print(f"{'tensors':54}  " + "  ".join(heading for _ in DTYPES[1:]))
    for kind, names in [*sorted(kinds.items()), ("all of them", sorted(exact.keys() - zero))]:
        cells = []
        for dtype in DTYPES[1:]:
            errors = [error(fishers[dtype][n], exact[n]) for n in names]
            ranks = [spearman(fishers[dtype][n], exact[n]) for n in names]
            cells.append(
                f"{statistics.median(errors):7.4f} ({max(errors):.3f})"
                f"  {statistics.median(ranks):.4f} ({min(ranks):.3f})"
            )
        print(f"{kind:54}  " + "  ".join(f"{cell:>32}" for cell in cells), flush=True)
    if zero:
        sizes = [max(rms(fishers[dtype][n]) for n in zero) / largest for dtype in DTYPES]
        print(
            f"{len(zero)} tensors are zero on paper; root mean square / that of the largest:",
            end=" ",
        )
        print(", ".join(f"{d} {size:.0e}" for d, size in zip(DTYPES, sizes, strict=True)))


def rms(x: torch.Tensor) -> float:
    """Return the root mean square."""
    return float(x.double().square().mean().sqrt())


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ‖found − expected‖ / ‖expected‖."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def spearman(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the rank correlation over what is not zero in both."""
    some = (found != 0) | (expected != 0)
    ranks = torch.stack([found[some], expected[some]]).argsort(1).argsort(1).double()
    return float(torch.corrcoef(ranks)[0, 1])


if __name__ == "__main__":
    main()
