"""What came out: one table, one picture, and the same numbers as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import dist, sqrt
from pathlib import Path
from typing import Any

from rich.table import Table

from fisher_mergekit.study.evaluate import Estimate, Score
from fisher_mergekit.study.plots import load_pyplot, save
from fisher_mergekit.study.tasks import Task

NAMES = {"linear": "isotropic", "fisher": "Fisher"}
"""What a method is called in front of a reader."""

COLORS = {"linear": "#777777", "fisher": "#1f6fb4"}

EQUAL = 0.5
"""The share of the first model when both lambdas are the same."""

CROWDED = 4.0
"""So near to a specialist, in percent, a merge is drawn without its lambda."""

Scores = Mapping[str, Score]
"""One model's score on each task, by the task's name."""


@dataclass(frozen=True)
class Point:
    """One merge of two models: its method, the first model's lambda of 1 in all, its scores."""

    method: str
    share: float
    scores: Scores


@dataclass(frozen=True)
class Results:
    """Everything that a study measured.

    Attributes:
        tasks: two tasks, in the order of the specialists.
        specialists: each specialist's scores on held-out examples, by its task's name.
        merges: merges, on held-out examples: equal lambdas and each method's chosen ones.
        frontier: merges with many lambdas, on validation examples. Lambda is chosen here.
    """

    tasks: tuple[Task, Task]
    specialists: Mapping[str, Scores]
    merges: Sequence[Point]
    frontier: Sequence[Point]

    def merge(self, method: str, share: float) -> Point:
        """Return a merge that was scored on held-out examples."""
        return next(p for p in self.merges if (p.method, p.share) == (method, share))

    def pairs(self) -> dict[str, tuple[Point, Point]]:
        """Return (isotropic, Fisher) with equal lambdas, and with the chosen ones."""
        equal = (self.merge("linear", EQUAL), self.merge("fisher", EQUAL))
        chosen = (
            self.merge("linear", best_share(self.frontier, "linear")),
            self.merge("fisher", best_share(self.frontier, "fisher")),
        )
        return {"equal": equal, "chosen": chosen}


def best_share(frontier: Sequence[Point], method: str) -> float:
    """Return the share with the best mean accuracy; of several, the most equal one."""
    points = [p for p in frontier if p.method == method]
    # Rounded: sums of the same shares in another order are equally good.
    best = max(points, key=lambda p: (round(mean(p.scores).value, 9), -abs(p.share - EQUAL)))
    return best.share


def mean(scores: Scores) -> Estimate:
    """Return the mean accuracy over tasks."""
    return _mean([score.accuracy for score in scores.values()])


def gains(pair: tuple[Point, Point]) -> dict[str, Estimate]:
    """Return by how much the second merge beats the first on each task, on the same examples."""
    first, second = pair
    return {name: score.minus(first.scores[name]) for name, score in second.scores.items()}


def _mean(estimates: Sequence[Estimate]) -> Estimate:
    """Return the mean of independent estimates."""
    count = len(estimates)
    error = sqrt(sum(estimate.standard_error**2 for estimate in estimates))
    return Estimate(sum(estimate.value for estimate in estimates) / count, error / count)


def percent(estimate: Estimate, *, signed: bool = False) -> str:
    """Write an estimate in percent, with its standard error."""
    value = f"{100 * estimate.value:+.1f}" if signed else f"{100 * estimate.value:.1f}"
    return f"{value} ± {100 * estimate.standard_error:.1f}"


def table(results: Results) -> Table:
    """Return the results on held-out examples as one table."""
    names = [task.name for task in results.tasks]
    chosen_on = " + ".join(f"{len(task.validation):,}" for task in results.tasks)
    out = Table(
        title="Accuracy on held-out examples (%, ± standard error)",
        caption=f"lambda: of the {names[0]} and of the {names[1]} specialist;\n"
        f"  * chosen for the best mean on {chosen_on} validation examples\n"
        "specialist on the other task: its body under that task's head\n"
        "gain: Fisher − isotropic, on the same examples",
        caption_justify="left",
    )
    out.add_column("")
    out.add_column("lambda", justify="center", vertical="bottom")
    for task in results.tasks:
        out.add_column(f"{task.name}\n{len(task.labels)} labels", justify="right")
    out.add_column("mean", justify="right", vertical="bottom")
    for name, scores in results.specialists.items():
        out.add_row(f"{name} specialist", "", *_cells(scores, names), end_section=name == names[-1])
    for kind, pair in results.pairs().items():
        for point in pair:
            lambdas = f"{point.share:g} : {1 - point.share:g}"
            lambdas += " *" if kind == "chosen" else ""
            out.add_row(f"{NAMES[point.method]} merge", lambdas, *_cells(point.scores, names))
        gain = gains(pair)
        cells = [gain[name] for name in names]
        written = [percent(cell, signed=True) for cell in (*cells, _mean(cells))]
        out.add_row("  gain", "", *written, end_section=True)
    out.add_row("held-out examples", "", *(f"{len(task.held_out):,}" for task in results.tasks), "")
    return out


def _cells(scores: Scores, names: Sequence[str]) -> list[str]:
    return [*(percent(scores[name].accuracy) for name in names), percent(mean(scores))]


def picture(results: Results, file: Path) -> None:
    """Draw what each method makes of the two models, over all lambdas, to a file.

    Raises:
        FisherMergekitError: matplotlib is missing, or the file cannot be written.
    """
    pyplot = load_pyplot()
    from matplotlib import patheffects

    across, up = results.tasks
    figure, axes = pyplot.subplots(figsize=(5.6, 4.8), dpi=150)
    halo = [patheffects.withStroke(linewidth=2.5, foreground="white")]

    def at(point: Point) -> tuple[float, float]:
        return (
            100 * point.scores[across.name].accuracy.value,
            100 * point.scores[up.name].accuracy.value,
        )

    for method, name in NAMES.items():
        curve = sorted(
            (p for p in results.frontier if p.method == method), key=lambda point: point.share
        )
        color = COLORS[method]
        best = best_share(results.frontier, method)
        axes.plot(*zip(*map(at, curve), strict=True), "-", color=color, lw=1.6, label=name)
        # The text stands outside the bend, Fisher's above and isotropic's below.
        side = 1 if method == "fisher" else -1
        corners = [at(curve[0]), at(curve[-1])]
        for point in curve[1:-1]:
            chosen = point.share == best
            axes.plot(*at(point), "o", color=color, ms=9 if chosen else 4.5, mec="white", mew=0.8,
                      zorder=4 if chosen else 3)  # fmt: skip
            if min(dist(at(point), corner) for corner in corners) < CROWDED:
                continue
            axes.annotate(f"{point.share:g}", at(point), fontsize=7, color=color,
                          xytext=(4 * side, 4 * side), textcoords="offset points",
                          ha="left" if side > 0 else "right",
                          va="bottom" if side > 0 else "top",
                          weight="bold" if chosen else "normal", path_effects=halo)  # fmt: skip
    ends = {point.share: point for point in results.frontier if point.share in (0, 1)}
    for share, name, offset, align in (
        (0, up.name, (0, -9), ("center", "top")),
        (1, across.name, (-9, 0), ("right", "center")),
    ):
        axes.plot(*at(ends[share]), "*", color="black", ms=11, zorder=5)
        axes.annotate(f"{name}\nspecialist", at(ends[share]), fontsize=8, xytext=offset,
                      textcoords="offset points", ha=align[0], va=align[1],
                      path_effects=halo)  # fmt: skip
    # Where the dotted lines cross, one model would be as good as both specialists.
    axes.axvline(at(ends[1])[0], color="0.8", lw=0.8, ls=":", zorder=0)
    axes.axhline(at(ends[0])[1], color="0.8", lw=0.8, ls=":", zorder=0)
    axes.set_xlabel(f"accuracy on {across.name}, % of {len(across.validation):,}")
    axes.set_ylabel(f"accuracy on {up.name}, % of {len(up.validation):,}")
    axes.set_title(
        f"One merge a point; numbers: lambda of the {across.name} specialist", fontsize=9
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(0.09)
    axes.legend(frameon=False, loc="lower left", fontsize=9)
    save(figure, file)


def write_json(results: Results, file: Path, **about: Any) -> None:
    """Write all numbers, and what else is to be known of the run, to a file."""

    def plain(scores: Scores) -> dict[str, Any]:
        return {name: asdict(score.accuracy) for name, score in scores.items()}

    def points(many: Sequence[Point]) -> list[dict[str, Any]]:
        return [
            {"method": p.method, "lambdas": [p.share, round(1 - p.share, 12)],
             "accuracy": plain(p.scores)}
            for p in many
        ]  # fmt: skip

    content = {
        "held_out": {
            "examples": {task.name: len(task.held_out) for task in results.tasks},
            "specialists": {name: plain(scores) for name, scores in results.specialists.items()},
            "merges": points(results.merges),
            "gains": {
                kind: {name: asdict(gain) for name, gain in gains(pair).items()}
                for kind, pair in results.pairs().items()
            },
        },
        "validation": {
            "examples": {task.name: len(task.validation) for task in results.tasks},
            "frontier": points(results.frontier),
        },
        **about,
    }
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
