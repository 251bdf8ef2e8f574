"""MiniLM on headlines (five sections) and on film reviews (two sentiments): bodies are merged."""

from __future__ import annotations

import merge_oracle
import pytest
import torch
from models import read
from real.specialists import (
    MAX_LENGTH,
    Classifiers,
    assert_better_than_chance,
    run,
    write_recipe,
)
from running import assert_close
from transformers import AutoTokenizer

from fisher_mergekit.sidecar.reader import Sidecar
from fisher_mergekit.study.evaluate import load

pytestmark = [pytest.mark.real, pytest.mark.slow]

HEAD = {"classifier.weight", "classifier.bias"}
DENSE = "bert.encoder.layer.3.intermediate.dense.weight"


@pytest.fixture(scope="module")
def merged(subjects, workshop):
    """Merges of the same two sidecars, for each task's head."""
    outs = []
    for task, base in zip(subjects.tasks, subjects.specialists, strict=True):
        recipe = write_recipe(
            workshop / f"for-{task.name}.yml",
            *subjects.specialists,
            base=base,
            parameters={"exclude": ["classifier"]},
        )
        outs.append(workshop / f"merged-for-{task.name}")
        run("mergekit-yaml", recipe, outs[-1])
    return outs


def test_head_is_the_targets_and_body_the_fisher_average(subjects: Classifiers, merged):
    thetas, fishers = subjects.thetas, subjects.fishers
    assert thetas[0]["classifier.weight"].shape != thetas[1]["classifier.weight"].shape
    body = [name for name in thetas[0] if name not in HEAD]
    expected = merge_oracle.merge(thetas, fishers, [1.0, 1.0], body)
    for target, out in zip(thetas, merged, strict=True):
        found = read(out)
        assert {name: found[name].shape for name in HEAD} == {n: target[n].shape for n in HEAD}
        assert all(torch.equal(found[name], target[name]) for name in HEAD)
        assert_close(found, {**expected, **{name: target[name] for name in HEAD}},
                     rtol=1e-6, atol=1e-7)  # fmt: skip


def test_body_does_not_depend_on_whose_head_is_kept(merged):
    first, second = (read(out) for out in merged)
    for name in first.keys() - HEAD:
        assert torch.equal(first[name], second[name]), name


def test_reloaded_model_answers_as_the_average_by_hand(subjects: Classifiers, merged):
    thetas = subjects.thetas
    body = [name for name in thetas[0] if name not in HEAD]
    average = merge_oracle.merge(thetas, subjects.fishers, [1.0, 1.0], body)
    for task, specialist, out in zip(subjects.tasks, subjects.specialists, merged, strict=True):
        by_hand = load(specialist.folder, task)
        # Not strict: the average has no head, and the specialist keeps its own.
        by_hand.load_state_dict({n: t.float() for n, t in average.items()}, strict=False)
        inputs = AutoTokenizer.from_pretrained(out)(
            list(task.held_out.texts[:32]), truncation=True, max_length=MAX_LENGTH,
            padding=True, return_tensors="pt",
        )  # fmt: skip
        with torch.inference_mode():
            found, expected = load(out, task)(**inputs).logits, by_hand(**inputs).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_task_whose_model_has_most_of_the_lambda_is_kept(subjects: Classifiers, workshop):
    # Equal lambdas promise neither task anything: these two pull one body in different directions.
    # Near a specialist its task has to survive, and the sidecars need no second measuring.
    for index, (task, base) in enumerate(zip(subjects.tasks, subjects.specialists, strict=True)):
        recipe = write_recipe(
            workshop / f"mostly-{task.name}.yml",
            *subjects.specialists,
            base=base,
            lambdas=[0.9, 0.1] if index == 0 else [0.1, 0.9],
            parameters={"exclude": ["classifier"]},
        )
        out = workshop / f"merged-mostly-{task.name}"
        run("mergekit-yaml", recipe, out)
        assert_better_than_chance(out, task)


@pytest.mark.parametrize(
    ("method", "kind", "parameters"),
    [
        ("regmean", "gram", {"offdiagonal": 1.0}),
        ("mats", "kfac", {"normalize_fishers": False, "offdiagonal": 1.0}),
    ],
)
def test_factors_merge_bodies_and_leave_the_head(
    subjects: Classifiers, workshop, method, kind, parameters
):
    base = subjects.specialists[1]
    recipe = write_recipe(
        workshop / f"{method}.yml",
        *subjects.specialists,
        base=base,
        method=method,
        parameters={"exclude": ["classifier"], **parameters},
    )
    out = workshop / f"merged-{method}"
    run("mergekit-yaml", recipe, out)
    found = read(out)
    assert all(torch.equal(found[name], base.thetas[name]) for name in HEAD)
    # Of one layer the equation Σ Bᵢ (W − Wᵢ) Aᵢ = 0, with what was measured.
    thetas = [theta[DENSE].double() for theta in subjects.thetas]
    sidecars = [Sidecar(specialist.sidecar, kind) for specialist in subjects.specialists]
    factors = [
        [sidecar.load(name).double() for name in sidecar.measurement.factors[DENSE].names]
        for sidecar in sidecars
    ]

    def left(theta: torch.Tensor) -> float:
        total = torch.zeros_like(theta)
        for own, (inputs, *outputs) in zip(thetas, factors, strict=True):
            product = (theta - own) @ inputs
            total += outputs[0] @ product if outputs else product
        return float(total.norm())

    assert left(found[DENSE].double()) < 1e-4 * left(sum(thetas) / 2)
