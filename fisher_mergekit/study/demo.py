"""The whole story, on a real model and real text: `mergekit-fisher demo`.

Two specialists of one small model learn two tasks that have little to do with each other. Each is
measured once. Then their bodies are merged again and again from the same two sidecars: for one
task's head and for the other's, with equal lambdas and with lambdas chosen on validation examples.
Beside every Fisher merge stands the isotropic one, mergekit's own `linear`.

Measuring and merging are the commands that a user would type, on recipes that stay there to read.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import NoReturn, cast

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from fisher_mergekit.errors import FisherMergekitError
from fisher_mergekit.study import report
from fisher_mergekit.study.evaluate import evaluate, load, score
from fisher_mergekit.study.finetune import finetune
from fisher_mergekit.study.frontier import COMPARED, read_bodies
from fisher_mergekit.study.heads import graft
from fisher_mergekit.study.plots import load_pyplot
from fisher_mergekit.study.report import EQUAL, Point, Results, Scores, best_share
from fisher_mergekit.study.tasks import TASKS, Sizes, Task, minilm


@dataclass(frozen=True)
class Specialist:
    """How one specialist comes to be; its name is the task's and the folder's."""

    name: str
    sizes: Sizes
    epochs: int
    learning_rate: float


SPECIALISTS = (
    Specialist("headlines", Sizes(1000, 300, 796), epochs=4, learning_rate=5e-5),
    Specialist("reviews", Sizes(2400, 300, 1000), epochs=2, learning_rate=1e-4),
)


@dataclass(frozen=True)
class DemoSettings:
    """What can be chosen about the demo.

    Attributes:
        out: a new or empty folder for everything that is written.
        seed: of everything random; the same seed gives the same numbers on the same machine.
        examples: how many training examples each specialist is measured on.
        max_length: texts are cut to this many tokens, everywhere.
        specialists: the two specialists.
        shares: the first one's lambdas, of 1 in all, that are tried on validation examples.
        threads: CPU threads; `None` leaves the choice to torch.
        quiet: no progress bars and no commands' output.
    """

    out: Path
    seed: int = 0
    examples: int = 1024
    max_length: int = 64
    specialists: tuple[Specialist, Specialist] = SPECIALISTS
    shares: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    threads: int | None = None
    quiet: bool = False


@dataclass
class Clock:
    """How long each part of the story took."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Count the time of a `with` block under the name of a part."""
        start = time.perf_counter()
        try:
            yield
        finally:
            passed = time.perf_counter() - start
            self.seconds[part] = self.seconds.get(part, 0.0) + passed


def run(settings: DemoSettings, clock: Clock | None = None) -> Results:
    """Tell the story: everything is written into `settings.out`, the numbers are returned.

    Raises:
        FisherMergekitError: a package of the `demo` extra is missing, the folder is not empty, or
            a command failed.
    """
    clock = clock or Clock()
    tasks = prepare(settings)
    with clock.time("training"), used_threads(settings.threads):
        train(tasks, settings)
    write_recipes(tasks, dict.fromkeys(COMPARED, EQUAL), settings)
    with clock.time("measuring"):
        # One recipe is enough: all others name the same two models.
        command(["mergekit-fisher", "precompute", recipe("fisher", tasks[0], EQUAL)], settings)
    with clock.time("choosing lambdas"), used_threads(settings.threads):
        frontier = explore(tasks, settings)
    chosen = {method: best_share(frontier, method) for method in COMPARED}
    write_recipes(tasks, chosen, settings)
    merges = list(dict.fromkeys((m, s) for m in COMPARED for s in (EQUAL, chosen[m])))
    with clock.time("merging"):
        for method, share in merges:
            for task in tasks:
                name = recipe(method, task, share)
                command(["mergekit-yaml", name, merged(method, task, share)], settings)
    with clock.time("evaluating"), used_threads(settings.threads):
        results = evaluate_all(tasks, merges, frontier, settings)
    report.picture(results, settings.out / "picture.png")
    report.write_json(
        results, settings.out / "results.json", seed=settings.seed, seconds=clock.seconds
    )
    return results


def prepare(settings: DemoSettings) -> tuple[Task, Task]:
    """Load the tasks and check that everything needed is there, before anything takes time."""
    minilm()
    load_pyplot()
    tasks = tuple(TASKS[s.name](s.sizes, seed=settings.seed) for s in settings.specialists)
    out = settings.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FisherMergekitError(
            f"{out} is already there and not an empty folder; the demo overwrites nothing. "
            f"Run: mergekit-fisher demo --out {out}-2"
        )
    out.mkdir(parents=True, exist_ok=True)
    return cast("tuple[Task, Task]", tasks)


def train(tasks: tuple[Task, Task], settings: DemoSettings) -> None:
    """Fine-tune one specialist a task, and put each one's body under the other's head.

    Each specialist's training examples are written beside it: it will be measured on them.
    """
    for task, specialist in zip(tasks, settings.specialists, strict=True):
        task.train.write_jsonl(settings.out / f"{task.name}-train.jsonl")
        finetune(
            minilm(),
            task,
            settings.out / task.name,
            epochs=specialist.epochs,
            learning_rate=specialist.learning_rate,
            max_length=settings.max_length,
            seed=settings.seed,
            quiet=settings.quiet,
        )
    for task, other in (tasks, tasks[::-1]):
        graft(*(settings.out / name for name in (other.name, task.name, grafted(other, task))))


def grafted(body: Task, head: Task) -> str:
    """Return the folder of one specialist's body under the other's head."""
    return f"grafted/{body.name}-under-{head.name}-head"


def recipe(method: str, base: Task, share: float) -> str:
    """Return the file name of a recipe; `share` is the first specialist's lambda."""
    return f"{method}-{base.name}-{share:g}.yml"


def merged(method: str, base: Task, share: float) -> str:
    """Return the folder of a merged model."""
    return f"merged/{method}-{base.name}-{share:g}"


FISHER_RECIPE = """\
# Both specialists in one body, under the {base} head.
#   mergekit-fisher precompute {recipe}    once: all merges share the sidecars
#   mergekit-yaml {recipe} {merged}
merge_method: fisher
base_model: ./{base}
models:
  - model: ./{first}
    parameters: {{lambda: {share:g}}}
    calibration: {{path: {first}-train.jsonl, text: text, label: label}}
  - model: ./{second}
    parameters: {{lambda: {rest:g}}}
    calibration: {{path: {second}-train.jsonl, text: text, label: label}}
parameters:
  exclude: [classifier]
calibration: {{estimator: exact, examples: {examples}, max_length: {max_length}}}
dtype: float32
"""

LINEAR_RECIPE = """\
# Both specialists in one body, under the {base} head. mergekit's `linear` cannot merge heads of
# different size, so the other specialist's body was put under the {base} head first.
#   mergekit-yaml {recipe} {merged}
merge_method: linear
models:
  - model: ./{first}
    parameters: {{weight: {share:g}}}
  - model: ./{second}
    parameters: {{weight: {rest:g}}}
dtype: float32
"""


def write_recipes(
    tasks: tuple[Task, Task], shares: Mapping[str, float], settings: DemoSettings
) -> None:
    """Write a recipe for each method and each task's head, with the first specialist's lambda."""
    for method, share in shares.items():
        for base in tasks:
            # The isotropic merge needs the base's head on both bodies.
            bare = method == "fisher"
            names = [t.name if bare or t is base else grafted(t, base) for t in tasks]
            text = (FISHER_RECIPE if method == "fisher" else LINEAR_RECIPE).format(
                base=base.name,
                first=names[0],
                second=names[1],
                share=share,
                rest=round(1 - share, 12),
                recipe=recipe(method, base, share),
                merged=merged(method, base, share),
                # Asking for more examples than a specialist was trained on would be a warning.
                examples=min(settings.examples, *(len(task.train) for task in tasks)),
                max_length=settings.max_length,
            )
            (settings.out / recipe(method, base, share)).write_text(text, encoding="utf-8")


def command(words: Sequence[str], settings: DemoSettings) -> None:
    """Run a command of this Python's environment in the demo's folder, as a user would.

    Raises:
        FisherMergekitError: it failed.
    """
    options = [] if settings.threads is None else ["-j", str(settings.threads)]
    if settings.quiet:
        options.append("--quiet")
    else:
        print(f"$ {' '.join(words)}", file=sys.stderr, flush=True)
    script = Path(sysconfig.get_path("scripts")) / words[0]
    done = subprocess.run(
        [str(script), *words[1:], *options],
        cwd=settings.out,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=settings.quiet,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        said = f":\n{(done.stderr or done.stdout).strip()}" if settings.quiet else "."
        raise FisherMergekitError(
            f"`{' '.join(words)}` in {settings.out} failed with exit status {done.returncode}{said}"
        )


def explore(tasks: tuple[Task, Task], settings: DemoSettings) -> list[Point]:
    """Score merges with many lambdas on validation examples.

    They are made in memory, from the same files and by the same arithmetic as the checkpoints
    that `mergekit-yaml` writes.
    """
    folders = [settings.out / task.name for task in tasks]
    bodies = read_bodies(folders)
    classifiers = [load(folder, task) for folder, task in zip(folders, tasks, strict=True)]
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    shares = (0.0, *settings.shares, 1.0)
    total = len(COMPARED) * len(shares) * sum(len(task.validation) for task in tasks)
    points = []
    with progress_bar(total, "Choosing lambdas", settings) as bar:
        for method, share in product(COMPARED, shares):
            body = bodies.merge(method, [share, 1 - share])
            scores = {}
            for classifier, task in zip(classifiers, tasks, strict=True):
                # Not strict: the merged body has no head, and each classifier keeps its own.
                classifier.load_state_dict(body, strict=False)
                scores[task.name] = score(
                    classifier,
                    tokenizer,
                    task.validation,
                    max_length=settings.max_length,
                    progress=bar.update,
                )
            points.append(Point(method, share, scores))
    return points


def evaluate_all(
    tasks: tuple[Task, Task],
    merges: Sequence[tuple[str, float]],
    frontier: Sequence[Point],
    settings: DemoSettings,
) -> Results:
    """Score the specialists and the merged checkpoints on held-out examples."""
    out = settings.out
    total = (2 + len(merges)) * sum(len(task.held_out) for task in tasks)
    with progress_bar(total, "Evaluating", settings) as bar:
        ask = partial(evaluate, max_length=settings.max_length, progress=bar.update)
        specialists: dict[str, Scores] = {
            mine.name: {
                task.name: ask(out / (mine.name if task is mine else grafted(mine, task)), task)
                for task in tasks
            }
            for mine in tasks
        }
        points = [
            Point(method, share, {t.name: ask(out / merged(method, t, share), t) for t in tasks})
            for method, share in merges
        ]
    return Results(tasks, specialists, points, frontier)


def progress_bar(total: int, name: str, settings: DemoSettings) -> tqdm[NoReturn]:
    """Return a bar that counts examples."""
    return tqdm(total=total, desc=name, unit="example", disable=settings.quiet)


@contextmanager
def used_threads(threads: int | None) -> Iterator[None]:
    """Compute with this many CPU threads for a while."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
