"""Slow and obvious references: one example at a time, all parameters, plain autograd, float64.

Nothing here is shared with what it checks but the definition of an example, its batch of one, and
(for the sampled estimator) which outcome was drawn.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fisher_mergekit.measure.batches import Batch, Example, collate

Fishers = dict[str, Tensor]


def exact_classifier(model: nn.Module, examples: Sequence[Example]) -> Fishers:
    """Mean over examples of Σ_y p(y|x) (∂ log p(y|x) / ∂θ)²: one backward pass a class."""

    def one(model: nn.Module, batch: Batch) -> Fishers:
        log_p = model(**batch.inputs).logits[0].log_softmax(-1)
        total = zeros(model)
        for y in range(len(log_p)):
            weight = log_p[y].detach().exp()
            for name, gradient in gradients(log_p[y], model).items():
                total[name] += weight * gradient.square()
        return total

    return mean_over_examples(model, examples, one)


def classifier_given(
    model: nn.Module, examples: Sequence[Example], outcomes: dict[int, int]
) -> Fishers:
    """Mean over examples of (∂ log p(y|x) / ∂θ)² for one given class an example, by its number."""

    def one(model: nn.Module, batch: Batch) -> Fishers:
        log_p = model(**batch.inputs).logits[0].log_softmax(-1)
        return squared(gradients(log_p[outcomes[batch.numbers[0]]], model))

    return mean_over_examples(model, examples, one)


def causal_lm_given(
    model: nn.Module,
    examples: Sequence[Example],
    outcomes: dict[int, Sequence[int]],
    prompts: Mapping[int, int] = MappingProxyType({}),
) -> Fishers:
    """Mean over examples of (∂ Σ_t log p(y_t | x_<t) / ∂θ)², y the second to the last token.

    The tokens of the prompt are left out of the sum.

    Args:
        outcomes: y_t of every token t of an example, by its number.
        prompts: how many leading tokens are prompt, by its number; none where it is missing.
    """

    def one(model: nn.Module, batch: Batch) -> Fishers:
        number = batch.numbers[0]
        log_p = model(**batch.inputs).logits[0].log_softmax(-1)
        likelihood = log_p.new_zeros(())
        for position in range(1, len(log_p)):
            if position >= prompts.get(number, 0):
                likelihood = likelihood + log_p[position - 1, outcomes[number][position]]
        return squared(gradients(likelihood, model))

    return mean_over_examples(model, examples, one)


def expectation(
    model: nn.Module,
    examples: Sequence[Example],
    outcomes: Callable[[Any, Example], Iterable[tuple[float, Tensor]]],
) -> Fishers:
    """Mean over examples of Σ_y weight_y (∂ log p(y|x) / ∂θ)², one backward pass an outcome.

    Args:
        outcomes: from the model's output and the example to (weight, log p(y|x)) of each outcome.
    """

    def one(model: nn.Module, batch: Batch) -> Fishers:
        total = zeros(model)
        for weight, log_p in outcomes(model(**batch.inputs), batch.examples[0]):
            for name, gradient in gradients(log_p, model).items():
                total[name] += weight * gradient.square()
        return total

    return mean_over_examples(model, examples, one)


def mean_over_examples(
    model: nn.Module,
    examples: Sequence[Example],
    one: Callable[[nn.Module, Batch], Fishers],
) -> Fishers:
    """Average what `one` says of each example alone, unpadded, in a float64 copy of the model."""
    model = copy.deepcopy(model).double().eval().requires_grad_(True)
    total = zeros(model)
    for example in examples:
        batch = collate([example], pad_token_id=0).to("cpu", torch.float64)
        for name, value in one(model, batch).items():
            total[name] += value / len(examples)
    return total


def gradients(scalar: Tensor, model: nn.Module) -> Fishers:
    """Return ∂ scalar / ∂θ of every named parameter; zero where it plays no part."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    if not scalar.requires_grad:
        return zeros(model)
    found = torch.autograd.grad(scalar, parameters, retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for name, p, g in zip(names, parameters, found, strict=True)
    }


def squared(fishers: Fishers) -> Fishers:
    return {name: value.square() for name, value in fishers.items()}


def zeros(model: nn.Module) -> Fishers:
    return {name: torch.zeros_like(p) for name, p in model.named_parameters()}


def assert_same_fishers(
    found: Fishers, expected: Fishers, *, relative: float = 1e-5, noise: float = 1e-12
) -> None:
    """Compare every tensor by its own norm, and report all that differ together.

    Args:
        relative: largest relative error of a tensor.
        noise: what counts as zero, relative to the largest tensor's root mean square. A bias of
            attention keys shifts all scores alike, so its gradient is zero on paper; in float32
            there remains rounding of about 1e-7, whose square is this.
    """
    assert sorted(found) == sorted(expected)
    floor = noise * max(rms(value) for value in expected.values())
    wrong = []
    for name, value in expected.items():
        error = rms(found[name].double() - value.double())
        if not error <= relative * rms(value) + floor:
            wrong.append(f"{name}: error {error:.2e} of {rms(value):.2e} (floor {floor:.1e})")
    assert not wrong, "\n".join(wrong)


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def in_float64(model: nn.Module) -> nn.Module:
    """Return a copy of a model to be differentiated in float64."""
    double = copy.deepcopy(model).double().eval().requires_grad_(True)
    if hasattr(double, "set_experts_implementation"):
        double.set_experts_implementation("eager")  # the others know no float64
    return double
