"""Fine-tuned models, measured by one recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import yaml
from models import Tensors, read
from real.texts import Genre
from running import command

from fisher_mergekit.study.demo import used_threads
from fisher_mergekit.study.evaluate import evaluate
from fisher_mergekit.study.finetune import finetune
from fisher_mergekit.study.tasks import Task, minilm

EXAMPLES = 48
"""On how many of its training examples a specialist is measured."""

MAX_LENGTH = 48
"""Texts are cut to this many tokens, everywhere."""

THREADS = 2
"""Training is worth both cores, unlike what the other tests compute."""


@dataclass(frozen=True)
class Specialist:
    """One fine-tuned model on disk, its calibration data, and what was measured."""

    folder: Path
    calibration: Path

    @property
    def entry(self) -> dict:
        """This model in a recipe."""
        return {"model": str(self.folder), "calibration": {"path": str(self.calibration)}}

    @property
    def sidecar(self) -> Path:
        return self.folder / "sidecar"

    @property
    def thetas(self) -> Tensors:
        return read(self.folder)

    @property
    def fishers(self) -> Tensors:
        return read(self.sidecar)


@dataclass(frozen=True)
class Measured:
    """Specialists of one model, measured by a recipe; the first is the recipe's base model."""

    specialists: tuple[Specialist, ...]
    recipe: Path

    @property
    def thetas(self) -> list[Tensors]:
        return [specialist.thetas for specialist in self.specialists]

    @property
    def fishers(self) -> list[Tensors]:
        return [specialist.fishers for specialist in self.specialists]


@dataclass(frozen=True)
class Classifiers(Measured):
    """Classifiers, and the task of each."""

    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class Writers(Measured):
    """Two language models, and the genre of each."""

    genres: tuple[Genre, Genre]


def write_recipe(
    path: Path,
    *specialists: Specialist,
    base: Specialist,
    method: str = "fisher",
    lambdas: Sequence[float] | None = None,
    **keys: object,
) -> Path:
    """Write a recipe; `keys` are added to it.

    Lambda is written as `weight`, which mergekit's own methods know as well.
    """
    models = [
        {**specialist.entry, "parameters": {"weight": share}}
        for specialist, share in zip(specialists, lambdas or [1.0] * len(specialists), strict=True)
    ]
    content = {
        "merge_method": method,
        "base_model": str(base.folder),
        "models": models,
        "dtype": "float32",
        **keys,
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def run(script: str, *arguments: object) -> str:
    """Run a command that must succeed; return what it said."""
    done = command(script, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def train_classifier(
    task: Task, folder: Path, *, learning_rate: float = 1e-4, batch_size: int = 32
) -> Specialist:
    calibration = folder.with_name(f"{folder.name}-train.jsonl")
    task.train.write_jsonl(calibration)
    finetune(minilm(), task, folder, learning_rate=learning_rate, batch_size=batch_size,
             max_length=MAX_LENGTH, quiet=True)  # fmt: skip
    return Specialist(folder, calibration)


def measured_classifiers(
    folder: Path,
    *tasks: Task,
    kinds: str = "fisher",
    training: Mapping[str, Any] | None = None,
    **keys: object,
) -> Classifiers:
    folder.mkdir()
    with used_threads(THREADS):
        specialists = tuple(
            train_classifier(task, folder / task.name, **(training or {})) for task in tasks
        )
    calibration = {"text": "text", "label": "label", "estimator": "exact",
                   "examples": EXAMPLES, "max_length": MAX_LENGTH}  # fmt: skip
    recipe = write_recipe(
        folder / "recipe.yml", *specialists, base=specialists[0], calibration=calibration, **keys
    )
    run("mergekit-fisher", "precompute", recipe, "--kind", kinds)
    return Classifiers(specialists, recipe, tasks)


def assert_better_than_chance(model: Path, task: Task) -> None:
    """Assert that a model beats the best constant answer by three standard errors."""
    labels = task.held_out.labels
    chance = max(labels.count(label) for label in labels) / len(labels)
    noise = sqrt(chance * (1 - chance) / len(labels))
    found = evaluate(model, task, max_length=MAX_LENGTH).accuracy.value
    assert found > chance + 3 * noise, f"{task.name}: {found:.3f}, by chance {chance:.3f}"
