"""How good is a saved classifier on a task? Accuracy, with a standard error.

With n examples of which a share p is right, the standard error is √(p (1 − p) / n). Two models are
compared on the same examples, so what they both get right or wrong says nothing about the
difference: with dₙ ∈ {−1, 0, 1} per example it is mean(d) ± √(var(d) / n).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fisher_mergekit.errors import FisherMergekitError
from fisher_mergekit.study.finetune import batches, hushed_transformers, pad
from fisher_mergekit.study.tasks import Examples, Task

Progress = Callable[[int], object]
"""Called with the number of examples of each batch."""


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error, both as shares of 1."""

    value: float
    standard_error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Return the mean of independent values."""
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / len(values)
        return cls(mean, sqrt(variance / len(values)))


@dataclass(frozen=True)
class Score:
    """Which examples a model got right."""

    correct: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.correct)

    @property
    def accuracy(self) -> Estimate:
        """The share of right answers."""
        return Estimate.of([float(right) for right in self.correct])

    def minus(self, other: Score) -> Estimate:
        """Return the difference in accuracy from another model's score on the same examples."""
        pairs = zip(self.correct, other.correct, strict=True)
        return Estimate.of([float(mine) - float(theirs) for mine, theirs in pairs])


def load(model: Path, task: Task) -> Any:
    """Load a saved classifier in float32, ready to be asked.

    Raises:
        FisherMergekitError: its labels are not the task's, in the same order.
    """
    with hushed_transformers():
        classifier = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32)
    found = tuple(classifier.config.id2label[i] for i in range(classifier.config.num_labels))
    if found != task.labels:
        raise FisherMergekitError(
            f"{model} answers with the labels {', '.join(found)}, but {task.name} has "
            f"{', '.join(task.labels)}. Evaluate a model that carries this task's head."
        )
    classifier.eval()
    return classifier


def score(
    classifier: Any,
    tokenizer: Any,
    examples: Examples,
    *,
    batch_size: int = 64,
    max_length: int = 64,
    progress: Progress = lambda examples: None,
) -> Score:
    """Return which examples a loaded classifier gets right.

    Args:
        classifier: a model in evaluation mode.
        tokenizer: its tokenizer.
        examples: what to ask.
        batch_size: changes speed only.
        max_length: texts are cut to this many tokens.
        progress: called after each batch.
    """
    encoded = tokenizer(list(examples.texts), truncation=True, max_length=max_length)["input_ids"]
    correct = [False] * len(encoded)
    # In an order of mixed lengths a progress bar's ETA can be believed.
    order = batches([len(tokens) for tokens in encoded], batch_size, random.Random(0))
    with torch.inference_mode():
        for chosen in order:
            logits = classifier(**pad(tokenizer, [encoded[i] for i in chosen])).logits
            for i, answer in zip(chosen, logits.argmax(-1).tolist(), strict=True):
                correct[i] = answer == examples.labels[i]
            progress(len(chosen))
    return Score(tuple(correct))


def evaluate(
    model: Path,
    task: Task,
    *,
    max_length: int = 64,
    progress: Progress = lambda examples: None,
) -> Score:
    """Return which of the task's held-out examples the classifier in a folder gets right."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    classifier = load(model, task)
    return score(classifier, tokenizer, task.held_out, max_length=max_length, progress=progress)


def accuracy(model: Path, task: Task, *, max_length: int = 64) -> float:
    """Return the share of held-out examples that a saved classifier gets right."""
    return evaluate(model, task, max_length=max_length).accuracy.value
