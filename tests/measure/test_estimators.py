"""Every estimator on every architecture, against plain autograd on single examples."""

from __future__ import annotations

import copy

import oracles
import pytest
import tiny
import torch
from oracles import assert_same_fishers

from fisher_mergekit.measure.batches import collate
from fisher_mergekit.measure.likelihoods import likelihood_for

BATCH_SIZES = (1, 3)
"""One example, and padded batches of which the last is smaller."""

PROMPTS = {number: number for number in range(5)}
"""Of `tiny.ragged_texts(5, prompt=True)`."""


def outcomes_drawn(model, examples, seed):
    """Return what the sampled estimator draws for each example alone, unpadded, in float64."""
    model = copy.deepcopy(model).double()
    likelihood = likelihood_for(type(model).__name__)
    drawn = {}
    for example in examples:
        batch = collate([example], tiny.PAD)
        outcome = likelihood.sample(model(**batch.inputs).logits.detach(), batch, seed)[0].tolist()
        # What position t of a causal LM predicts is token t + 1; the first is filled up.
        drawn[example.number] = outcome if isinstance(outcome, int) else [None, *outcome]
    return drawn


@pytest.mark.parametrize("architecture", tiny.CLASSIFIERS)
class TestClassifiers:
    def test_exact_is_the_expectation_over_all_classes(self, architecture):
        model, examples = tiny.classifier(architecture), tiny.ragged(5)
        expected = oracles.exact_classifier(model, examples)
        assert all(value.any() for value in expected.values()), "a test of zeros tests nothing"
        for size in BATCH_SIZES:
            assert_same_fishers(tiny.measured(model, examples, batch_size=size), expected)

    def test_empirical_takes_the_labels_of_the_data(self, architecture):
        model, examples = tiny.classifier(architecture), tiny.ragged(5)
        labels = {example.number: int(example.outcome) for example in examples}
        expected = oracles.classifier_given(model, examples, labels)
        for size in BATCH_SIZES:
            found = tiny.measured(model, examples, "empirical", batch_size=size)
            assert_same_fishers(found, expected)

    def test_sampled_takes_the_drawn_classes(self, architecture):
        model, examples = tiny.classifier(architecture), tiny.ragged(5)
        drawn = outcomes_drawn(model, examples, seed=5)
        expected = oracles.classifier_given(model, examples, drawn)
        for size in BATCH_SIZES:
            found = tiny.measured(model, examples, "sampled", batch_size=size, seed=5)
            assert_same_fishers(found, expected)


@pytest.mark.parametrize("name", tiny.CAUSAL_LMS)
class TestCausalLMs:
    def test_empirical_squares_the_whole_sequence(self, name):
        model, examples = tiny.causal_lm(name), tiny.ragged_texts(5, prompt=True)
        tokens = {example.number: tiny.ids_of(example) for example in examples}
        expected = oracles.causal_lm_given(model, examples, tokens, PROMPTS)
        for size in BATCH_SIZES:
            found = tiny.measured(model, examples, "empirical", batch_size=size)
            assert_same_fishers(found, expected)

    def test_sampled_takes_the_drawn_tokens(self, name):
        model, examples = tiny.causal_lm(name), tiny.ragged_texts(5, prompt=True)
        drawn = outcomes_drawn(model, examples, seed=5)
        expected = oracles.causal_lm_given(model, examples, drawn, PROMPTS)
        for size in BATCH_SIZES:
            found = tiny.measured(model, examples, "sampled", batch_size=size, seed=5)
            assert_same_fishers(found, expected)


@pytest.mark.parametrize("labels", [2, 5])
def test_exact_holds_for_any_number_of_classes(labels):
    model, examples = tiny.classifier(labels=labels), tiny.ragged(classes=labels)
    expected = oracles.exact_classifier(model, examples)
    assert_same_fishers(tiny.measured(model, examples), expected)


@pytest.mark.parametrize("labels", [2, 3, 5])
def test_exact_costs_one_backward_pass_less_than_there_are_classes(labels, monkeypatch):
    model, examples = tiny.classifier(labels=labels), tiny.ragged(4)
    session = tiny.session_for(model)
    session.run(examples, 4)
    passes = []
    grad = torch.autograd.grad

    def counted(outputs, *rest, **options):
        if outputs.shape == (4, labels):  # from the logits, not inside a layer's rule
            passes.append(outputs)
        return grad(outputs, *rest, **options)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    monkeypatch.setattr(session, "verify", lambda examples: None)
    session.run(examples, 4)
    assert len(passes) == labels - 1


def test_token_types_of_a_pair_are_measured_too():
    model = tiny.classifier()
    examples = [
        tiny.labelled(
            e.number,
            tiny.ids_of(e),
            int(e.outcome),
            token_type_ids=[int(i >= len(e) // 2) for i in range(len(e))],
        )
        for e in tiny.ragged(5)
    ]
    expected = oracles.exact_classifier(model, examples)
    found = tiny.measured(model, examples)
    assert_same_fishers(found, expected)
    assert (found["bert.embeddings.token_type_embeddings.weight"] > 0).all()


def test_bfloat16_models_are_measured_into_float32():
    model, examples = tiny.classifier().bfloat16(), tiny.ragged(5)
    found = tiny.measured(model, examples)
    assert {value.dtype for value in found.values()} == {torch.float32}
    expected = oracles.exact_classifier(model, examples)
    for name in ("classifier.weight", "bert.encoder.layer.0.output.dense.weight"):
        torch.testing.assert_close(found[name], expected[name].float(), rtol=0.3, atol=1e-3)
