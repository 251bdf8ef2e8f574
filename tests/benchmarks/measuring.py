"""What measuring costs: the Fisher against an ordinary training step on the same batch, and peers.

    python tests/benchmarks/measuring.py              # everything: a quarter of an hour
    python tests/benchmarks/measuring.py --only MiniLM --ways step Fisher --rounds 15

One table. A row is one model and one length; the columns are `ways/`: an ordinary forward and
backward pass without optimizer (`step`), fisher_mergekit with the head's default estimator
(`Fisher`: exact for classifiers, sampled for language models) and with the labels (`empirical`),
and what measures the latter elsewhere: the loop over single examples and three libraries.

They are timed in turn, round by round, in one process, so that a noisy machine is noisy for all of
them; two passes each, of which the second counts. With one thread the clock is the process's CPU
time, otherwise the one on the wall. Of each round's ratio to the step the median is shown, and
below it the ratio of the fastest passes. Peak memory is that above the loaded model, in processes
of their own (`memory.py`), of going over the batch and of preparing for that, as our verifying of
the rules; its aim is the step's and one accumulator, 4 bytes a parameter. `covered` is how many of
the parameters there is a result for, and `error` how far it is from the loop's, over all that is
covered, ‖F - F_loop‖ / ‖F_loop‖. A dash is what cannot be had, for a reason told below the table.
Needs the `demo` extra (the model), and `benchmark` for the libraries.
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import transformers
from torch import Tensor

from cases import Case, cases, smoke_cases
from memory import Peaks, peaks
from ways import WAYS, Library, Loop, Step, Unable, Way

WIDTHS = (23, 12)
"""Of the labels, and of each column."""


@dataclass
class Row:
    """What was found out about one case; all by the title of the way."""

    case: Case
    parameters: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, Peaks | None] = field(default_factory=dict)
    covered: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    unable: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    titles = [way.title for way in WAYS]
    parser.add_argument("--rounds", type=int, default=15, help="at most (default: 15)")
    parser.add_argument(
        "--seconds", type=float, default=60, help="for a row's rounds; 2 in any case (default: 60)"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--ways", nargs="+", choices=titles, default=titles)
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--smoke", action="store_true", help="does it run? tiny models")
    options = parser.parse_args(arguments)
    logging.getLogger().setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # the peers' and torch's, about each other
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)

    ways = [way for way in WAYS if way is Step or way.title in options.ways]
    chosen = [
        case for case in (smoke_cases if options.smoke else cases)() if options.only in case.name
    ]
    clock = "CPU time" if options.threads == 1 else "wall clock"
    print(f"{clock}, threads: {options.threads}, torch {torch.__version__}\n")
    print(cells("", ["aim", *(way.title for way in ways)]))
    notes: dict[str, None] = {}
    while chosen:  # a model is let go before the next one comes
        case = chosen.pop(0)
        row = measure(case, ways, options.rounds, options.seconds, options.threads)
        if not options.no_memory:
            row.memory = {way.title: peaks(case, way) for way in shown(case, ways)}
        print(*lines(row, ways), sep="\n", flush=True)
        notes.update(dict.fromkeys(row.notes))
    print("", *(f"* {note}" for note in notes), sep="\n")


def shown(case: Case, ways: Sequence[type[Way]]) -> Iterator[type[Way]]:
    """Yield the ways that the row shows: more classes are about our own exact estimator only."""
    for way in ways:
        if not (way.takes_labels and case.classes > 2):
            yield way


def measure(
    case: Case, ways: Sequence[type[Way]], rounds: int, seconds: float, threads: int
) -> Row:
    """Prepare all ways, compare what the first pass says, and time the next ones."""
    row = Row(case, sum(p.numel() for p in case.model.parameters()))
    ready: list[Way] = []
    for way in shown(case, ways):
        where = f"{way.title}, {case.model_name}"
        try:
            prepared = way(case)
            prepared.run()
        except Unable as reason:
            row.unable.add(way.title)
            row.notes.append(f"{where}: {reason}.")
        except Exception as reason:
            if not issubclass(way, Library):
                raise
            said = f"{type(reason).__name__}: {reason}".splitlines()[0]
            row.unable.add(way.title)
            row.notes.append(f"{where}: it fails with {said[:150]}")
        else:
            ready.append(prepared)
            row.notes += [f"{where}: {note}." for note in prepared.notes()]
    truth = next((way.squares() for way in ready if isinstance(way, Loop)), {})
    for way in ready:
        squares = way.squares()
        if not isinstance(way, Step):
            row.covered[way.title] = sum(x.numel() for x in squares.values()) / row.parameters
        if way.takes_labels and truth and not isinstance(way, Loop):
            row.errors[way.title] = error(squares, truth)
    row.seconds = timed(
        ready, rounds, seconds, time.process_time if threads == 1 else time.perf_counter
    )
    del ready
    gc.collect()
    return row


def error(squares: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Return the relative error over all tensors of `squares` together."""
    off = sum(float((x - truth[name]).double().square().sum()) for name, x in squares.items())
    norm = sum(float(truth[name].double().square().sum()) for name in squares)
    return (off / norm) ** 0.5


def timed(ways: Sequence[Way], rounds: int, seconds: float, clock) -> dict[str, list[float]]:
    """Return each way's seconds in every round, of the second of two passes.

    A measurement is many batches after each other, and so is training: the first pass after another
    way's pays for the memory that the other one has left behind.
    """
    times: dict[str, list[float]] = {way.title: [] for way in ways}
    end = time.perf_counter() + seconds
    for number in range(rounds):
        if number >= 2 and time.perf_counter() > end:
            break
        for way in ways:
            way.run()
            start = clock()
            way.run()
            times[way.title].append(clock() - start)
    return times


def lines(row: Row, ways: Sequence[type[Way]]) -> Iterator[str]:
    """Yield the lines of the table."""
    step, case = row.seconds[Step.title], row.case
    yield ""
    seconds = f"step {statistics.median(step):.3f} s, {len(step)} rounds"
    yield f"{case.name} ({row.parameters / 1e6:.1f}M parameters; {seconds})"

    def line(label: str, aim: str, found: dict[str, str]) -> str:
        gaps = dict.fromkeys(row.unable, "-")
        return cells(f"  {label}", [aim, *({**gaps, **found}.get(w.title, "") for w in ways)])

    passes = max(1, case.classes - 1)
    limit = (1.2 if case.tokens < 64 else 1.05) * (1 + 2 * passes) / 3
    medians = {
        title: statistics.median(a / b for a, b in zip(found, step, strict=True))
        for title, found in row.seconds.items()
    }
    fastest = {title: min(found) / min(step) for title, found in row.seconds.items()}
    yield line("time / step", f"{limit:.2f}", {t: f"{x:.2f}" for t, x in medians.items()})
    yield line("  fastest / fastest", "", {t: f"{x:.2f}" for t, x in fastest.items()})
    known = {title: x for title, x in row.memory.items() if x is not None}
    if Step.title in known:
        aim = f"{known[Step.title].running + 4 * row.parameters / 2**20:.0f}"
        yield line("peak memory (MiB)", aim, {t: str(round(x.running)) for t, x in known.items()})
        yield line("  preparing", "", {t: str(round(x.preparing)) for t, x in known.items()})
    yield line("covered (%)", "100", {t: f"{100 * x:.1f}" for t, x in row.covered.items()})
    if row.errors:
        yield line("error", "", {t: f"{x:.0e}" for t, x in row.errors.items()})


def cells(label: str, texts: Sequence[str]) -> str:
    """Return one line of the table."""
    return label.ljust(WIDTHS[0]) + "".join(text.rjust(WIDTHS[1]) for text in texts)


if __name__ == "__main__":
    main()
