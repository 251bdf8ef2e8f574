"""MiniLM on four domains of one task: one measurement, and one recipe whose method changes."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from models import Tensors, read
from real import texts
from real.specialists import (
    EXAMPLES,
    MAX_LENGTH,
    THREADS,
    Classifiers,
    Specialist,
    measured_classifiers,
    run,
)
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fisher_mergekit.sidecar.reader import Sidecar
from fisher_mergekit.study.demo import used_threads
from fisher_mergekit.study.evaluate import evaluate
from fisher_mergekit.study.tasks import Sizes

pytestmark = [pytest.mark.real, pytest.mark.slow]

METHODS = ("linear", "fisher", "regmean")
QUERY = "bert.encoder.layer.0.attention.self.query.weight"
DENSE = "bert.encoder.layer.5.intermediate.dense.weight"
HEAD = "classifier.weight"


@pytest.fixture(scope="module")
def family(workshop: Path) -> Classifiers:
    sizes = Sizes(train=480, validation=0, held_out=120)
    tasks = [texts.sentiment(name, sizes) for name in texts.DOMAINS]
    # Few examples in many steps, for the time it takes.
    training = {"learning_rate": 3e-4, "batch_size": 16}
    folder = workshop / "family"
    return measured_classifiers(folder, *tasks, kinds="fisher,gram", training=training)


@pytest.fixture(scope="module")
def merge(family: Classifiers, workshop: Path):
    """The one recipe, with another method in it, or with parameters too."""

    @cache
    def merged(method: str, parameters: str = "{}") -> Path:
        text = family.recipe.read_text(encoding="utf-8")
        assert text.count("merge_method: fisher\n") == 1
        text = text.replace("merge_method: fisher\n", f"merge_method: {method}\n")
        recipe = workshop / f"{method}-{len(list(workshop.iterdir()))}.yml"
        recipe.write_text(f"{text}parameters: {parameters}\n", encoding="utf-8")
        run("mergekit-yaml", recipe, recipe.with_suffix(""))
        return recipe.with_suffix("")

    return merged


@pytest.fixture(scope="module")
def accuracies(family: Classifiers, merge):
    """Of each method, the mean over domains."""

    @cache
    def mean(method: str) -> float:
        scores = [evaluate(merge(method), task, max_length=MAX_LENGTH) for task in family.tasks]
        return sum(score.accuracy.value for score in scores) / len(scores)

    return mean


@pytest.mark.parametrize("method", METHODS)
def test_every_method_answers_better_than_chance(family, accuracies, method):
    chances = []
    for task in family.tasks:
        labels = task.held_out.labels
        chances.append(max(map(labels.count, labels)) / len(labels))
    # Three standard errors of the mean, at most: a share's variance is at most 1/4 over n.
    noise = 3 * 0.5 / sum(len(task.held_out) for task in family.tasks) ** 0.5
    assert accuracies(method) > sum(chances) / len(chances) + noise


def test_regmean_answers_no_worse_than_the_mean_of_weights(accuracies):
    assert accuracies("regmean") > accuracies("linear") - 0.05  # some 2.5 standard errors


@pytest.fixture(scope="module")
def seen(family: Classifiers) -> list[Tensors]:
    with used_threads(THREADS):
        return [rows_seen(specialist) for specialist in family.specialists]


def rows_seen(specialist: Specialist) -> Tensors:
    """Return what some linear layers get as inputs, `[rows, inputs]`, by weight, of the calibration
    examples, each alone, by plain PyTorch."""
    model = AutoModelForSequenceClassification.from_pretrained(specialist.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(specialist.folder)
    rows: dict[str, list[Tensor]] = {name: [] for name in (QUERY, DENSE, HEAD)}
    for name, found in rows.items():
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda module, args, found=found: found.append(args[0].flatten(0, -2).double())
        )
    with torch.inference_mode():
        for line in specialist.calibration.read_text(encoding="utf-8").splitlines()[:EXAMPLES]:
            text = json.loads(line)["text"]
            model(**tokenizer(text, truncation=True, max_length=MAX_LENGTH, return_tensors="pt"))
    return {name: torch.cat(found) for name, found in rows.items()}


def least_squares(rows: list[Tensor], thetas: list[Tensor], offdiagonal: float) -> Tensor:
    """Return the weights that answer all models' rows most like the models did.

    A Gram whose off-diagonals are times a is that of rows √a·x, and √(1 − a)·|x| along each axis.
    """
    xs, ys = [], []
    for x, theta in zip(rows, thetas, strict=True):
        lengths = x.square().sum(0).sqrt()
        x = torch.cat([offdiagonal**0.5 * x, (1 - offdiagonal) ** 0.5 * lengths.diag()])
        xs.append(x)
        ys.append(x @ theta.mT)
    with used_threads(THREADS):
        return torch.linalg.lstsq(torch.cat(xs), torch.cat(ys)).solution.mT


@pytest.mark.parametrize(
    ("name", "offdiagonal"), [(QUERY, 0.9), (DENSE, 0.9), (HEAD, 0.9), (QUERY, 1.0)]
)
def test_regmean_is_least_squares_on_the_rows_that_the_models_see(
    family, merge, seen, name, offdiagonal
):
    thetas = [theta[name].double() for theta in family.thetas]
    mean = sum(thetas) / len(thetas)
    expected = least_squares([rows[name] for rows in seen], thetas, offdiagonal)
    folder = merge("regmean") if offdiagonal == 0.9 else merge("regmean", "{offdiagonal: 1.0}")
    error = (read(folder)[name] - expected).norm() / (expected - mean).norm()
    assert error < 2e-4


def test_without_shrinking_no_linear_layer_answers_more_like_its_models(family, merge):
    # For every layer at once: the loss Σ ‖X W − X Wᵢ‖², by the Grams that were measured.
    merges = {method: read(merge(method)) for method in ("linear", "fisher", "regmean")}
    least = read(merge("regmean", "{offdiagonal: 1.0}"))
    thetas = family.thetas
    sidecars = [Sidecar(s.sidecar, "gram") for s in family.specialists]
    described = sidecars[0].measurement.factors
    layers = [name for name in described if "embeddings" not in name]
    assert len(layers) == 6 * 6 + 2
    for name in layers:
        grams = [sidecar.load(described[name].inputs).double() for sidecar in sidecars]

        def loss(merged: Tensors, name: str = name, grams: list[Tensor] = grams) -> float:
            away = [merged[name].double() - theta[name].double() for theta in thetas]
            return sum(float((d @ a * d).sum()) for d, a in zip(away, grams, strict=True))

        for method, merged in merges.items():
            assert loss(least) <= loss(merged) * (1 + 1e-6), (name, method)
        assert loss(least) < 0.95 * loss(merges["linear"]), name


def test_what_has_no_gram_is_the_mean(family, merge):
    found, thetas = read(merge("regmean")), family.thetas
    factors = Sidecar(family.specialists[0].sidecar, "gram").measurement.factors
    others = [name for name in found if name not in factors or "embeddings" in name]
    assert "classifier.bias" in others
    assert "bert.embeddings.word_embeddings.weight" in others
    for name in others:
        mean = sum(theta[name].double() for theta in thetas) / len(thetas)
        torch.testing.assert_close(found[name].double(), mean, rtol=1e-6, atol=1e-7)
