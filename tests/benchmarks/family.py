"""All methods side by side, on real models. Run it from the folder `tests`:

    python -m benchmarks.family domains [--seeds 3] [--more] [--folder DIR]
    python -m benchmarks.family tasks [--seeds 3] [--more] [--folder DIR]

`domains`: four MiniLMs with one label scheme, each fine-tuned on another of VADER's domains, become
one; heads are merged too. `tasks`: the demo's two specialists, whose labels differ, share a body
under each one's head (`exclude: [classifier]`). All lambdas are equal. All rows are one recipe, of
which `merge_method` and the method's parameters change, and one measurement (`precompute --kind
fisher,gram,kfac`). `--more` adds rows of other parameters.

A seed decides which examples a specialist is trained and scored on, and everything random in its
training. Of each accuracy the table has the mean over seeds and the standard deviation between
them; the last column is the mean's difference from `linear`, taken seed by seed.

What is in the folder is not done again, so that another row costs one merge and its scores. Needs
the extra `demo`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from real import texts
from running import command
from torch import Tensor
from transformers import AutoTokenizer

from fisher_mergekit.study.demo import SPECIALISTS
from fisher_mergekit.study.evaluate import load
from fisher_mergekit.study.finetune import finetune, hushed_transformers, new_classifier, pad
from fisher_mergekit.study.heads import graft
from fisher_mergekit.study.tasks import TASKS, Sizes, Task, minilm

KINDS = "fisher,gram,kfac"
BATCH = 64


@dataclass(frozen=True)
class Study:
    """Which specialists are merged.

    Attributes:
        name: of it, and of its folder.
        tasks: of a seed.
        training: of each task: epochs and learning rate.
        exclude: the heads, if they differ.
        examples: how many a specialist is measured on.
        max_length: texts are cut to this many tokens, everywhere.
    """

    name: str
    tasks: Callable[[int], tuple[Task, ...]]
    training: Mapping[str, tuple[int, float]]
    exclude: tuple[str, ...] = ()
    examples: int = 128
    max_length: int = 64


def domains(seed: int) -> tuple[Task, ...]:
    sizes = Sizes(train=960, validation=0, held_out=300)
    return tuple(texts.sentiment(name, sizes, seed=seed) for name in texts.DOMAINS)


def tasks(seed: int) -> tuple[Task, ...]:
    return tuple(TASKS[s.name](s.sizes, seed=seed) for s in SPECIALISTS)


STUDIES = {
    study.name: study
    for study in (
        Study("domains", domains, dict.fromkeys(texts.DOMAINS, (2, 1e-4)), max_length=48),
        Study(
            "tasks",
            tasks,
            {s.name: (s.epochs, s.learning_rate) for s in SPECIALISTS},
            exclude=("classifier",),
        ),
    )
}


@dataclass(frozen=True)
class Row:
    """One way to merge.

    Attributes:
        name: as printed.
        method: the recipe's `merge_method`.
        parameters: the method's.
        weight: every model's.
    """

    name: str
    method: str
    parameters: Mapping[str, object] = field(default_factory=dict)
    weight: float = 1.0

    @property
    def is_ours(self) -> bool:
        """Whether it knows `exclude`; other methods get bodies that carry one head already."""
        return self.method in ("fisher", "regmean", "mats")


LINEAR = "linear"
ENSEMBLE = "ensemble of all"
ROWS = (
    Row(LINEAR, "linear"),
    # What their papers recommend where nothing is chosen on validation data.
    Row("task_arithmetic, 0.4", "task_arithmetic", weight=0.4),
    Row("ties, density 0.2", "ties", {"density": 0.2}),
    Row("fisher", "fisher"),
    Row("regmean", "regmean"),
    # More than two models take many iterations: to the default 1e-6 it would take many minutes.
    Row("mats, tolerance 0.01", "mats", {"tolerance": 0.01}),
)
MORE = (
    Row("regmean, offdiagonal 0", "regmean", {"offdiagonal": 0.0}),
    Row("regmean, offdiagonal 0.5", "regmean", {"offdiagonal": 0.5}),
    Row("regmean, offdiagonal 1", "regmean", {"offdiagonal": 1.0}),
    Row("regmean, embeddings", "regmean", {"embeddings": True}),
    Row("regmean, others: fisher", "regmean", {"others": "fisher"}),
    Row("mats, tolerance 1e-6", "mats"),
)


class Place:
    """One seed of a study: the specialists on disk, and what was found of every row."""

    def __init__(self, study: Study, seed: int, folder: Path) -> None:
        self.study, self.seed = study, seed
        self.folder = folder / study.name / str(seed)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tasks = study.tasks(seed)
        self.file = self.folder / "scores.json"
        self.scores: dict[str, dict[str, float]] = (
            json.loads(self.file.read_text()) if self.file.exists() else {}
        )

    def run(self, rows: Sequence[Row]) -> None:
        """Do all that is not done yet."""
        for task in self.tasks:
            if not (self.folder / task.name).exists():
                with self.log(f"training {task.name}"):
                    self.train(task)
        with self.log("measuring"):
            self.measure()
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder / self.tasks[0].name)
        if not all(f"{task.name} specialist" in self.scores for task in self.tasks):
            with self.log("the specialists"):
                self.score_specialists()
        for row in rows:
            if row.name not in self.scores:
                with self.log(row.name):
                    self.record(row.name, self.score_merge(row))

    def log(self, what: str) -> Log:
        return Log(f"{self.study.name}, seed {self.seed}: {what}")

    def record(self, name: str, scores: dict[str, float]) -> None:
        self.scores[name] = scores
        self.file.write_text(json.dumps(self.scores, indent=1), encoding="utf-8")

    def train(self, task: Task) -> None:
        """Fine-tune a specialist, and write what it was trained on beside it."""
        task.train.write_jsonl(self.folder / f"{task.name}-train.jsonl")
        epochs, learning_rate = self.study.training[task.name]
        with tempfile.TemporaryDirectory(dir=self.folder) as unfinished:
            out = Path(unfinished) / task.name
            finetune(minilm(), task, out, epochs=epochs, learning_rate=learning_rate,
                     max_length=self.study.max_length, seed=self.seed, quiet=True)  # fmt: skip
            out.rename(self.folder / task.name)

    def start(self, head: Task) -> Path:
        """Return the model that training began with, new head included, saved."""
        out = self.folder / f"start-{len(head.labels)}-labels"
        if not out.exists():
            with torch.random.fork_rng(devices=[]), hushed_transformers():
                torch.manual_seed(self.seed)
                new_classifier(minilm(), head.labels).save_pretrained(out)
        return out

    def recipe(self, head: Task) -> dict[str, Any]:
        """Return the recipe that every row changes, for one task's head."""
        models = [
            {
                "model": str(self.folder / task.name),
                "calibration": {"path": str(self.folder / f"{task.name}-train.jsonl")},
            }
            for task in self.tasks
        ]
        calibration = {"text": "text", "label": "label", "estimator": "exact",
                       "examples": self.study.examples,
                       "max_length": self.study.max_length}  # fmt: skip
        return {
            "merge_method": "fisher",
            "base_model": str(self.folder / head.name),
            "models": models,
            "parameters": {"exclude": list(self.study.exclude)} if self.study.exclude else {},
            "calibration": calibration,
            "dtype": "float32",
        }

    def measure(self) -> None:
        """Measure what has no sidecar yet."""
        path = self.folder / "recipe.yml"
        recipe = self.recipe(self.tasks[0])
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        done = command("mergekit-fisher", "precompute", path, "--kind", KINDS, "--quiet")
        if done.returncode != 0:
            raise SystemExit(done.stdout + done.stderr)

    def merge(self, row: Row, head: Task, room: Path) -> Path:
        """Return where the merge is, under one task's head; everything is written in `room`."""
        recipe = self.recipe(head)
        recipe["merge_method"] = row.method
        recipe["parameters"] |= row.parameters
        for entry in recipe["models"]:
            entry["parameters"] = {"weight": row.weight}
        if not row.is_ours:
            base = self.start(head)
            if recipe["parameters"].pop("exclude", None):
                for entry, task in zip(recipe["models"], self.tasks, strict=True):
                    entry["model"] = str(self.graft(task, head, room))
                graft(base, self.folder / head.name, room / "start")
                base = room / "start"
            recipe["base_model"] = str(base)
            if row.method == "linear":  # it would count among the models
                del recipe["base_model"]
        options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
        run_merge(MergeConfiguration.model_validate(recipe), str(room / "merged"), options)
        return room / "merged"

    def graft(self, body: Task, head: Task, room: Path) -> Path:
        """Return one specialist, under another one's head if heads differ."""
        if body is head or not self.study.exclude:
            return self.folder / body.name
        graft(self.folder / body.name, self.folder / head.name, room / body.name)
        return room / body.name

    def score_merge(self, row: Row) -> dict[str, float]:
        """Merge, for each task's head if heads differ, and score it on every task."""
        scores = {}
        model = None
        for task in self.tasks:
            with tempfile.TemporaryDirectory(dir=self.folder) as room:
                if self.study.exclude or model is None:
                    model = load(self.merge(row, task, Path(room)), task)
            scores[task.name] = accuracy(self.ask(model, task), task)
        return scores

    def score_specialists(self) -> None:
        """Score every specialist on every task, and what all say together."""
        said: dict[str, list[Tensor]] = {task.name: [] for task in self.tasks}
        for specialist in self.tasks:
            for task in self.tasks:
                with tempfile.TemporaryDirectory(dir=self.folder) as room:
                    model = load(self.graft(specialist, task, Path(room)), task)
                said[task.name].append(self.ask(model, task))
        for i, specialist in enumerate(self.tasks):
            found = {task.name: accuracy(said[task.name][i], task) for task in self.tasks}
            self.record(f"{specialist.name} specialist", found)
        own = {t.name: accuracy(said[t.name][i], t) for i, t in enumerate(self.tasks)}
        self.record("each on its own", own)
        if not self.study.exclude:
            together = {t.name: accuracy(sum(said[t.name]), t) for t in self.tasks}
            self.record(ENSEMBLE, together)

    def ask(self, classifier: Any, task: Task) -> Tensor:
        """Return the probabilities that it gives every held-out example, `[examples, labels]`."""
        encoded = self.tokenizer(
            list(task.held_out.texts), truncation=True, max_length=self.study.max_length
        )["input_ids"]
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        found = torch.empty(len(encoded), len(task.labels))
        with torch.inference_mode():
            for chosen in (order[i : i + BATCH] for i in range(0, len(order), BATCH)):
                inputs = pad(self.tokenizer, [encoded[i] for i in chosen])
                found[chosen] = classifier(**inputs).logits.softmax(-1)
        return found


class Log:
    """Say on the terminal what is done, and how long it took."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            seconds = time.perf_counter() - self.started
            print(f"{self.what}: {seconds:.0f} s", file=sys.stderr, flush=True)


def accuracy(found: Tensor, task: Task) -> float:
    """Return the percentage of held-out examples of which the likeliest label is right."""
    return 100 * float((found.argmax(-1) == torch.tensor(task.held_out.labels)).double().mean())


def table(places: Sequence[Place]) -> str:
    """Return all rows that every seed has."""
    columns = [task.name for task in places[0].tasks]
    names = [n for n in places[0].scores if all(n in place.scores for place in places)]
    width = max(map(len, names)) + 2
    lines = ["".join([" " * width, *(f"{title:>14}" for title in [*columns, "mean", "− linear"])])]
    for name in names:
        found = [place.scores[name] for place in places]
        cells = [[scores[column] for scores in found] for column in columns]
        means = [statistics.fmean(scores.values()) for scores in found]
        written = [spread(values) for values in [*cells, means]]
        if name != LINEAR and all(LINEAR in place.scores for place in places):
            base = [statistics.fmean(place.scores[LINEAR].values()) for place in places]
            written.append(spread([a - b for a, b in zip(means, base, strict=True)], sign="+"))
        lines.append("".join([f"{name:<{width}}", *(f"{cell:>14}" for cell in written)]))
    return "\n".join(lines)


def spread(values: Sequence[float], *, sign: str = "") -> str:
    """Write the mean and the standard deviation between seeds."""
    mean = f"{statistics.fmean(values):{sign}.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def main() -> None:
    """Do what is not there yet and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, … (default: 3)")
    parser.add_argument("--more", action="store_true", help="rows of other parameters, too")
    parser.add_argument("--folder", type=Path, default=Path("family"), help="default: ./family")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows = [*ROWS, *(MORE if arguments.more else ())]
    folder = arguments.folder.resolve()
    places = [Place(STUDIES[arguments.study], s, folder) for s in range(arguments.seeds)]
    for place in places:
        place.run(rows)
    seeds = f"mean ± standard deviation of {len(places)} seeds"
    print(f"{arguments.study}: accuracy on held-out examples in %, {seeds}\n")
    print(table(places))


if __name__ == "__main__":
    main()
