"""How the cost of measuring grows with the examples, and with the tokens of an example.

    python tests/benchmarks/linear.py [--picture docs/cost.png]

MiniLM, exact with two classes, one thread, CPU time. On the left the whole measurement, verifying
the rules included, of 16 to 256 examples of 32 tokens; on the right one batch of 8 examples of 32
to 512 tokens. Beside each the ordinary forward and backward pass over the same batches. The fastest
of some rounds counts, in which all sizes take turns. The lines are fits: a + b n for the examples,
and a + b t + c t² for the tokens, where c is what the attention adds; how much of the time that is
at the longest text is printed. Needs the extras `demo` and `plot`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn

from cases import Case, bert
from fisher_mergekit.measure.batches import batches
from fisher_mergekit.study.plots import load_pyplot, save
from ways import Fisher, Step
from ways.ours import session_for

EXAMPLES, TOKENS_EACH = (16, 32, 64, 128, 256), 32
TOKENS, BATCH_SIZE = (32, 64, 128, 192, 256, 384, 512), 8

OURS, ORDINARY = "measuring", "ordinary step"
COLORS = {OURS: "#0b6e99", ORDINARY: "#9a9a9a"}


@dataclass(frozen=True)
class Curve:
    """Seconds at some sizes, and the polynomial through them."""

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    coefficients: tuple[float, ...]

    def at(self, size: float) -> float:
        """Return the fitted seconds."""
        return sum(c * size**power for power, c in enumerate(self.coefficients))

    @property
    def worst(self) -> float:
        """The largest relative distance of a measured point from the fit."""
        return max(abs(y / self.at(x) - 1) for x, y in zip(self.sizes, self.seconds, strict=True))


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--picture", type=Path, default=Path("docs/cost.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    by_examples = examples_curves(options.rounds)
    by_tokens = tokens_curves(options.rounds)
    report("examples", by_examples)
    report("tokens", by_tokens)
    for name, curve in by_tokens.items():
        longest = curve.sizes[-1]
        share = curve.coefficients[2] * longest**2 / curve.at(longest)
        print(f"{name}: {100 * share:.0f}% of the time at {longest} tokens grows with their square")
    draw(by_examples, by_tokens, options.picture)


def examples_curves(rounds: int) -> dict[str, Curve]:
    """Time whole measurements, and the ordinary steps over the same batches."""
    case = Case("MiniLM-L6", partial(bert, 2), TOKENS_EACH, max(EXAMPLES), 2)
    model = case.copy().requires_grad_(True)
    parts = {n: list(batches(case.examples[:n], lambda _: 16, pad_token_id=0)) for n in EXAMPLES}

    def measure(count: int) -> Callable[[], None]:
        def run() -> None:
            session_for(case, "exact").run(case.examples[:count], batch_size=16)

        return run

    def steps(count: int) -> Callable[[], None]:
        def run() -> None:
            for batch in parts[count]:
                step(model, case, batch)

        return run

    functions = {OURS: measure, ORDINARY: steps}
    return curves(functions, EXAMPLES, rounds, degree=1)


def step(model: nn.Module, case: Case, batch) -> None:
    """One forward and backward pass; the gradients are written newly."""
    model.zero_grad(set_to_none=True)
    model(**batch.inputs, labels=case.labels(batch)).loss.backward()


def tokens_curves(rounds: int) -> dict[str, Curve]:
    """Time one batch, of every length."""
    all_cases = {t: Case("MiniLM-L6", partial(bert, 2), t, BATCH_SIZE, 2) for t in TOKENS}
    ways = {OURS: Fisher, ORDINARY: Step}
    ready = {(name, t): way(case) for name, way in ways.items() for t, case in all_cases.items()}

    def runner(name: str) -> Callable[[int], Callable[[], None]]:
        return lambda tokens: ready[name, tokens].run

    return curves({name: runner(name) for name in ways}, TOKENS, rounds, degree=2)


def curves(
    functions: dict[str, Callable[[int], Callable[[], None]]],
    sizes: Sequence[int],
    rounds: int,
    degree: int,
) -> dict[str, Curve]:
    """Time functions of a size in turn; fit a polynomial by the least relative squares."""
    found: dict[tuple[str, int], list[float]] = {(f, n): [] for f in functions for n in sizes}
    for round_ in range(rounds + 1):
        for (name, size), seconds in found.items():
            run = functions[name](size)
            start = time.process_time()
            run()
            if round_:
                seconds.append(time.process_time() - start)
    fitted = {}
    for name in functions:
        y = [min(found[name, n]) for n in sizes]
        powers = np.stack([np.array(sizes, float) ** k for k in range(degree + 1)], axis=1)
        relative = powers / np.array(y)[:, None]
        coefficients = np.linalg.lstsq(relative, np.ones(len(y)), rcond=None)[0]
        fitted[name] = Curve(tuple(sizes), tuple(y), tuple(coefficients.tolist()))
    return fitted


def report(what: str, found: dict[str, Curve]) -> None:
    """Print seconds, and how well the fit describes them."""
    sizes = next(iter(found.values())).sizes
    print(f"{what:>16}" + "".join(f"{n:>8}" for n in sizes) + "   worst distance from the fit")
    for name, curve in found.items():
        cells = "".join(f"{y:8.2f}" for y in curve.seconds)
        print(f"{name:>16}{cells}   {100 * curve.worst:.1f}%")
    print()


def draw(by_examples: dict[str, Curve], by_tokens: dict[str, Curve], file: Path) -> None:
    """Draw both pictures side by side."""
    pyplot = load_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.0, 3.7), dpi=150)
    for axes, found in ((left, by_examples), (right, by_tokens)):
        last = max(next(iter(found.values())).sizes)
        for name, curve in found.items():
            color = COLORS[name]
            places = np.linspace(0, last, 100)
            axes.plot(places, [curve.at(x) for x in places], "-", color=color, linewidth=1.6)
            axes.plot(curve.sizes, curve.seconds, "o", color=color, markersize=5.5,
                      markeredgecolor="white", markeredgewidth=0.9, zorder=3)  # fmt: skip
            axes.annotate(name, (last, curve.at(last)), xytext=(7, 0), textcoords="offset points",
                          color=color, va="center", fontsize="small")  # fmt: skip
        axes.set_xlim(0, last * 1.02)
        axes.set_ylim(0, None)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("0.6")
        axes.grid(axis="y", color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xticks([0, *(last * k // 4 for k in (1, 2, 3, 4))])
        axes.tick_params(length=3, color="0.6", labelcolor="0.25", labelsize="small")
    left.set_ylabel("CPU time (s)")
    left.set_xlabel(f"examples of {TOKENS_EACH} tokens")
    start = by_examples[OURS].coefficients[0]
    if start > 0:
        left.annotate("the rules are\nverified first", (0, start), xytext=(10, 66), color="0.35",
                      textcoords="offset points", fontsize="small",
                      arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.8,
                                  "shrinkB": 2})  # fmt: skip
    right.set_xlabel(f"tokens of each of {BATCH_SIZE} examples")
    ours = by_tokens[OURS]
    base, slope, _ = ours.coefficients
    last = ours.sizes[-1]
    right.plot((0, last), (base, base + slope * last), ":", color=COLORS[OURS], linewidth=1.3)
    right.annotate("measuring without\nwhat attention adds", (last, base + slope * last),
                   xytext=(7, 0), textcoords="offset points", color=COLORS[OURS], va="center",
                   fontsize="small")  # fmt: skip
    save(figure, file)


if __name__ == "__main__":
    main()
