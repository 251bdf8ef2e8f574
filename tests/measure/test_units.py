"""`unit: token`: every position's own gradient is squared, by one backward pass with signs."""

from __future__ import annotations

import oracles
import pytest
import tiny
import torch
from heads import HEADS, at_positions
from oracles import assert_same_fishers

from fisher_mergekit.errors import MeasureError
from fisher_mergekit.measure.batches import Example, collate
from fisher_mergekit.measure.likelihoods import Likelihood, likelihood_for
from fisher_mergekit.measure.likelihoods.draws import OUTCOMES, SIGNS, signs, uniforms
from fisher_mergekit.measure.units import token, unit_for


def words():
    head = HEADS["token classes"]
    return head.model(), head.examples()


def causal():
    return tiny.causal_lm("tied Qwen2"), tiny.ragged_texts(5, prompt=True)


def masked():
    head = HEADS["masked words of DistilBERT"]
    return head.model(), head.examples()


SUBJECTS = [words, causal, masked]


def only(example, position):
    """The same example with one scored position."""
    scored = torch.zeros_like(example.scored)
    scored[position] = True
    return Example(example.number, example.inputs, scored, example.outcome)


def position_by_position(model, examples):
    """Mean over examples of Σ_t (∂ℓ_t/∂θ)², a backward pass a position."""

    def each(output, example):
        for position in example.scored.nonzero().flatten().tolist():
            yield 1.0, at_positions(output, only(example, position), example.outcome)

    return oracles.expectation(model, examples, each)


def with_signs(model, examples, seed):
    """Mean over examples of (Σ_t ε_t ∂ℓ_t/∂θ)² with the signs that are drawn."""

    def signed(output, example):
        epsilon = signs(seed, [example.number], len(example.scored))[0]
        positions = example.scored.nonzero().flatten().tolist()
        terms = [
            epsilon[t] * at_positions(output, only(example, t), example.outcome) for t in positions
        ]
        yield 1.0, sum(terms, output.logits.new_zeros(()))

    return oracles.expectation(model, examples, signed)


@pytest.mark.parametrize("make", SUBJECTS)
def test_given_the_signs_it_is_the_oracle_s(make):
    model, examples = make()
    expected = with_signs(model, examples, seed=6)
    for size in (1, 3):
        found = tiny.measured(
            model, examples, "empirical", batch_size=size, seed=6, unit="token", fast=False
        )
        assert_same_fishers(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("make", SUBJECTS)
def test_the_mean_over_signs_is_the_sum_over_positions(make):
    """Within four standard errors in the sum of each tensor, and `sequence` is far outside."""
    model, examples = make()
    expected = position_by_position(model, examples)
    session = tiny.session_for(model, "empirical", unit="token")
    draws = [
        {n: v.double().sum() for n, v in measured_again(session, examples, seed).items()}
        for seed in range(60)
    ]
    whole = tiny.measured(model, examples, "empirical", fast=False)
    outside = 0
    for name, value in expected.items():
        if oracles.rms(value) < 1e-12:
            continue  # zero on paper: the bias of attention keys
        sums = torch.stack([draw[name] for draw in draws])
        error = 4 * sums.std() / len(draws) ** 0.5 + 1e-6 * value.sum()
        assert (sums.mean() - value.sum()).abs() <= error, name
        outside += bool((whole[name].double().sum() - value.sum()).abs() > error)
    assert outside > len(expected) / 3


def measured_again(session, examples, seed):
    """Run a session once more with another seed, verified the first time only."""
    session.seed = seed
    for total in session._taps.totals.values():
        total.zero_()
    totals = session.run(examples, 5)
    session.verify = lambda examples: None
    return {name: totals[p].clone() for name, p in session.model.named_parameters()}


@pytest.mark.slow
def test_of_drawn_outcomes_both_units_expect_the_same():
    """The exact Fisher, which has no cross terms between positions: both means meet it."""
    model, examples = words()
    exact = oracles.expectation(model, examples, HEADS["token classes"].expected)
    for unit in ("sequence", "token"):
        session = tiny.session_for(model, "sampled", unit=unit)
        draws = [measured_again(session, examples, seed) for seed in range(80)]
        for name, value in exact.items():
            if oracles.rms(value) < 1e-12:
                continue
            sums = torch.stack([draw[name].double().sum() for draw in draws])
            error = 4 * sums.std() / len(draws) ** 0.5
            assert (sums.mean() - value.sum()).abs() <= error, (unit, name)


def test_exact_knows_no_difference():
    model, examples = words()
    expected = oracles.expectation(model, examples, HEADS["token classes"].expected)
    assert_same_fishers(tiny.measured(model, examples, "exact", unit="token"), expected)


def test_signs_are_fair_and_know_nothing_of_the_outcomes():
    count = 40_000
    epsilon = signs(0, range(count // 10), 10).flatten()
    assert set(epsilon.tolist()) == {-1.0, 1.0}
    assert abs(epsilon.mean()) < 4 / count**0.5
    drawn = uniforms(0, range(count // 10), 10, OUTCOMES).flatten() - 0.5
    assert abs((epsilon * drawn).mean()) < 4 * drawn.std() / count**0.5
    assert not torch.equal(uniforms(0, [0], 9, SIGNS), uniforms(0, [0], 9, OUTCOMES))


def test_signs_hang_on_seed_and_example_alone():
    examples = HEADS["token classes"].examples()
    start = torch.ones(5, max(map(len, examples)), 3)
    batch = collate(examples, tiny.PAD)
    whole = token.weigh(start.clone(), batch, 4)
    for index, example in enumerate(examples):
        alone = token.weigh(start[:1, : len(example)].clone(), batch.single(index), 4)
        assert torch.equal(alone, whole[index : index + 1, : len(example)])
    assert not torch.equal(token.weigh(start.clone(), batch, 5), whole)


@pytest.mark.parametrize("known", Likelihood.known, ids=lambda known: known.name)
def test_heads_without_positions_have_no_token_unit(known):
    likelihood = known()
    likelihood.check(None, "sequence")
    if likelihood.has_positions:
        likelihood.check(None, "token")
    else:
        with pytest.raises(MeasureError, match=r"^`unit: token` is for models .*Leave out `unit:`"):
            likelihood.check(None, "token")


def test_the_units_are_those_of_the_recipe():
    from typing import get_args

    from fisher_mergekit.recipe import Estimator, Unit

    assert set(get_args(Unit)) == {"sequence", "token"}
    assert set(get_args(Estimator)) == {"exact", "sampled", "empirical"}
    for name in get_args(Unit):
        assert unit_for(name).weigh is not None
    assert likelihood_for("GPT2LMHeadModel").has_positions
