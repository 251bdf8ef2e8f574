"""Fine-tune a whole classifier on one task: AdamW, a short warm-up, linear decay, nothing else.

The loop is small enough to read because the demo's specialists should hide nothing. Everything
random (the head's first weights, dropout, the order of batches) follows from `seed`, so the same
seed on the same machine with the same number of threads gives the same weights.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from fisher_mergekit.study.tasks import Task

WARM_UP = 0.1
"""The share of the steps in which the learning rate rises."""

NEIGHBOURS = 16
"""Batches are cut from this many batches' examples sorted by length: less padding, still random."""


def finetune(
    model: Path,
    task: Task,
    out: Path,
    *,
    epochs: int = 2,
    learning_rate: float = 5e-5,
    batch_size: int = 32,
    max_length: int = 64,
    weight_decay: float = 0.01,
    seed: int = 0,
    quiet: bool = False,
) -> None:
    """Train all weights of `model`, with a head for `task`, and save the result in `out`.

    Args:
        model: a folder that `AutoModelForSequenceClassification` can read.
        task: its `train` examples are used, each once an epoch.
        out: the specialist's folder; safetensors in float32, and the tokenizer.
        epochs: passes over the examples.
        learning_rate: the highest, reached after the warm-up.
        batch_size: examples a step.
        max_length: texts are cut to this many tokens.
        weight_decay: of AdamW, on all weights.
        seed: of everything random.
        quiet: show no progress bar.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    encoded = tokenizer(list(task.train.texts), truncation=True, max_length=max_length)["input_ids"]
    steps = epochs * math.ceil(len(encoded) / batch_size)
    order = random.Random(seed)
    # The global generator is given back as it was found: a library must not reseed its caller.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with hushed_transformers():  # it would warn that the head is new
            classifier = new_classifier(model, task.labels)
        classifier.train()
        optimizer = torch.optim.AdamW(
            classifier.parameters(), lr=learning_rate, weight_decay=weight_decay, fused=True
        )
        step = 0
        with tqdm(total=steps, desc=f"Training {out.name}", unit="step", disable=quiet) as bar:
            for _ in range(epochs):
                for chosen in batches([len(tokens) for tokens in encoded], batch_size, order):
                    for group in optimizer.param_groups:
                        group["lr"] = learning_rate * schedule(step, steps)
                    labels = torch.tensor([task.train.labels[i] for i in chosen])
                    inputs = pad(tokenizer, [encoded[i] for i in chosen])
                    loss = torch.nn.functional.cross_entropy(classifier(**inputs).logits, labels)
                    optimizer.zero_grad()
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
                    optimizer.step()
                    step += 1
                    bar.update()
                    bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    with hushed_transformers():
        classifier.save_pretrained(out)
    tokenizer.save_pretrained(out)


def new_classifier(model: Path, labels: tuple[str, ...]) -> Any:
    """Load a model in float32; its head is new and random unless it has one of this size."""
    return AutoModelForSequenceClassification.from_pretrained(
        model,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )


def schedule(step: int, steps: int) -> float:
    """Return the learning rate of a step as a share of the highest: up, then linearly to zero."""
    warm = max(1, round(steps * WARM_UP))
    return min((step + 1) / warm, (steps - step) / max(1, steps - warm))


def batches(lengths: list[int], size: int, order: random.Random) -> Iterator[list[int]]:
    """Yield batches of example indices, every example once, similar lengths together."""
    shuffled = list(range(len(lengths)))
    order.shuffle(shuffled)
    cut = []
    for start in range(0, len(shuffled), size * NEIGHBOURS):
        pool = sorted(shuffled[start : start + size * NEIGHBOURS], key=lambda i: lengths[i])
        cut += [pool[k : k + size] for k in range(0, len(pool), size)]
    order.shuffle(cut)
    yield from cut


def pad(tokenizer: Any, token_ids: list[list[int]]) -> dict[str, Tensor]:
    """Return a padded batch: `input_ids` and `attention_mask`, `[batch, time]`."""
    return dict(tokenizer.pad({"input_ids": token_ids}, return_tensors="pt"))


@contextmanager
def hushed_transformers() -> Iterator[None]:
    """Keep transformers from warning and from drawing its own progress bars, for a while."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
