"""Tiny trainings by transformers' Trainer or a loop, and what Adam must have kept of them.

The oracle sees every gradient as it goes into a step, and keeps its running mean by the
parameter's *name*, in float64. It never looks at an optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from models import FAMILIES, VOCABULARY, Tensors, read
from torch import Tensor, nn

BETA2 = 0.95
"""So small that the weights of four steps are far apart."""


class Oracle:
    """The bias-corrected running mean of every parameter's squared gradient."""

    def __init__(self, beta2: float = BETA2):
        self.beta2 = beta2
        self.steps = 0
        self.values: dict[str, Tensor] = {}

    def see(self, model: nn.Module) -> None:
        """Take in the gradients of one step."""
        self.steps += 1
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                kept = self.values.get(name, torch.zeros(parameter.shape, dtype=torch.float64))
                square = parameter.grad.double().square()
                self.values[name] = self.beta2 * kept + (1 - self.beta2) * square

    def in_files(self, model: Any, folder: Path) -> Tensors:
        """Return the means by the names in a checkpoint: saved by transformers, as if weights."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self.values[name] / (1 - self.beta2**self.steps))
        model.save_pretrained(folder)
        return read(folder)


def load(folder: Path, family: str) -> Any:
    return getattr(transformers, FAMILIES[family][0]).from_pretrained(folder)


def rows(family: str, count: int = 16, seed: int = 0) -> list[dict[str, Tensor]]:
    """Return texts of six tokens; with classes, or to be predicted themselves."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        ids = torch.randint(4, VOCABULARY, (6,), generator=generator)
        is_class = "Sequence" in FAMILIES[family][0]
        found.append({"input_ids": ids, "labels": torch.tensor(number % 2) if is_class else ids})
    return found


class _Watch(transformers.TrainerCallback):
    def __init__(self, oracle: Oracle):
        self._oracle = oracle

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self._oracle.see(model)


def train(model: Any, family: str, out: Path, *, seed: int = 0, **options: Any) -> Oracle:
    """Train by the Trainer for four steps, into `out/checkpoint-4`."""
    arguments = {
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "adam_beta2": BETA2,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
        "seed": seed,
    }
    oracle = Oracle()
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(str(out), **{**arguments, **options}),
        train_dataset=rows(family, seed=seed),
        callbacks=[_Watch(oracle)],
    )
    trainer.train()
    return oracle


def loop(
    model: Any, family: str, out: Path, make: Callable[[Any], torch.optim.Optimizer], steps: int = 4
) -> Oracle:
    """Train by a loop of one's own; save the model, and the optimizer beside it."""
    oracle, optimizer = Oracle(), make(model)
    texts = rows(family)
    for step in range(steps):
        part = texts[4 * step : 4 * step + 4]
        batch = {key: torch.stack([row[key] for row in part]) for key in part[0]}
        optimizer.zero_grad()
        model(**batch).loss.backward()
        oracle.see(model)
        optimizer.step()
    model.save_pretrained(out)
    torch.save(optimizer.state_dict(), out / "optimizer.pt")
    return oracle
