"""Every head with every estimator, against plain autograd on single examples in float64."""

from __future__ import annotations

import copy

import oracles
import pytest
import tiny
import torch
from heads import HEADS
from oracles import assert_same_fishers

from fisher_mergekit.measure.batches import collate
from fisher_mergekit.measure.likelihoods import likelihood_for

pytestmark = pytest.mark.slow  # exhaustive: not needed at every change

BATCH_SIZES = (1, 3)
ENUMERABLE = [name for name, head in HEADS.items() if head.outcomes or "number" in name]


@pytest.fixture(params=HEADS)
def head(request):
    return HEADS[request.param]


def given(model, examples, head, outcomes):
    """The oracle for one outcome an example, by its number."""
    return oracles.expectation(
        model, examples, lambda output, e: [(1.0, head.log_p(output, e, outcomes[e.number]))]
    )


def assert_measured(head, model, examples, estimator, expected, **options):
    for size in BATCH_SIZES:
        found = tiny.measured(
            model, examples, estimator, batch_size=size, fast=head.fast, **options
        )
        assert_same_fishers(found, expected)


@pytest.mark.parametrize("name", ENUMERABLE)
def test_exact_is_the_expectation_over_all_outcomes(name):
    head = HEADS[name]
    model, examples = head.model(), head.examples()
    expected = oracles.expectation(model, examples, head.expected)
    assert_measured(head, model, examples, "exact", expected)


def test_empirical_takes_what_was_observed(head):
    model, examples = head.model(), head.examples()
    expected = given(model, examples, head, {e.number: e.outcome for e in examples})
    assert_measured(head, model, examples, "empirical", expected)


def test_sampled_takes_what_was_drawn(head):
    model, examples = head.model(), head.examples()
    likelihood = likelihood_for(type(model).__name__, model.config)
    double, drawn = copy.deepcopy(model).double(), {}
    for example in examples:
        batch = collate([example], tiny.PAD).to("cpu", torch.float64)
        logits = likelihood.logits(double(**batch.inputs), batch).detach()
        (drawn[example.number],) = likelihood.sample(logits, batch, 5)
    expected = given(model, examples, head, drawn)
    assert_measured(head, model, examples, "sampled", expected, seed=5)
