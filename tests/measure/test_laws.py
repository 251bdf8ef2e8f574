"""What must hold of any Fisher, whatever the model."""

from __future__ import annotations

import oracles
import pytest
import tiny
import torch
from oracles import assert_same_fishers, rms

from fisher_mergekit.measure.batches import batches, collate

ESTIMATORS = ("exact", "sampled", "empirical")


@pytest.fixture(scope="module")
def subject():
    return tiny.classifier(), tiny.ragged(12)


@pytest.fixture(scope="module")
def language_subject():
    return tiny.causal_lm("tied Qwen2"), tiny.ragged_texts(12, prompt=True)


@pytest.mark.parametrize("estimator", ESTIMATORS)
class TestNothingButRoundingChanges:
    def test_by_the_batch_size(self, subject, estimator):
        expected = tiny.measured(*subject, estimator, batch_size=12)
        for size in (1, 5, 7):
            assert_same_fishers(tiny.measured(*subject, estimator, batch_size=size), expected)

    def test_by_the_order_of_the_examples(self, subject, estimator):
        model, examples = subject
        expected = tiny.measured(model, examples, estimator, batch_size=5)
        found = tiny.measured(model, examples[::-1], estimator, batch_size=5)
        assert_same_fishers(found, expected)

    def test_by_padding(self, subject, estimator):
        """An example between long ones is padded; among its like it is not."""
        model, examples = subject
        short = [e for e in examples if len(e) == 2]
        padded = tiny.measured(model, [*short, examples[1]], estimator)
        parts = [
            tiny.measured(model, part, estimator, batch_size=1) for part in (short, [examples[1]])
        ]
        weight = len(short) / (len(short) + 1)
        expected = {n: weight * v + (1 - weight) * parts[1][n] for n, v in parts[0].items()}
        assert_same_fishers(padded, expected)

    def test_by_measuring_everything_twice(self, subject, estimator):
        """A mean, not a sum: the data set twice over says the same."""
        model, examples = subject
        expected = tiny.measured(model, examples, estimator, batch_size=5)
        found = tiny.measured(model, [*examples, *examples], estimator, batch_size=5)
        assert_same_fishers(found, expected)


@pytest.mark.parametrize("estimator", ["sampled", "empirical"])
def test_batch_size_and_order_change_no_causal_lm(language_subject, estimator):
    model, examples = language_subject
    expected = tiny.measured(model, examples, estimator, batch_size=12)
    for size in (1, 5):
        found = tiny.measured(model, examples[::-1], estimator, batch_size=size)
        assert_same_fishers(found, expected)


def test_measuring_leaves_the_model_as_it_was(subject):
    model, examples = subject
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits = model(input_ids=torch.tensor([[1, 2, 3]])).logits
    tiny.measured(model, examples)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(input_ids=torch.tensor([[1, 2, 3]])).logits, logits)
    assert not model.training


def test_a_session_can_run_again(subject):
    """Nothing of the first run is left in the second, not even suspicion of a rule."""
    model, examples = subject
    session = tiny.session_for(model)
    session.run(examples[:5], 2)
    totals = session.run(examples, 5)
    assert session.loose == ()
    found = {name: totals[parameter] for name, parameter in model.named_parameters()}
    assert_same_fishers(found, tiny.measured(model, examples, batch_size=5))


def test_a_model_in_training_mode_is_measured_without_dropout(subject):
    model, examples = subject
    expected = tiny.measured(model, examples)
    assert_same_fishers(tiny.measured(model.train(), examples), expected)


class TestSampled:
    def test_the_same_seed_gives_the_same_bits(self, subject):
        first, second = (tiny.measured(*subject, "sampled", seed=4) for _ in range(2))
        assert all(torch.equal(value, second[name]) for name, value in first.items())

    def test_another_seed_gives_another_estimate(self, subject):
        first, second = (tiny.measured(*subject, "sampled", seed=seed) for seed in (4, 5))
        assert not torch.equal(first["classifier.weight"], second["classifier.weight"])

    @pytest.mark.slow
    def test_the_mean_over_seeds_is_the_exact_fisher(self):
        """Within four standard errors, in a projection of each tensor and in all of them."""
        model, examples = tiny.classifier("DistilBertForSequenceClassification"), tiny.ragged(6)
        exact = oracles.exact_classifier(model, examples)
        session = tiny.session_for(model, "sampled")
        session.verify(examples)
        session.verify = lambda examples: None  # once is enough
        draws = []
        for seed in range(100):
            session.seed = seed
            totals = session.run(examples, 6)
            draws.append({n: totals[p].double().sum() for n, p in model.named_parameters()})
        for name, value in exact.items():
            sums = torch.stack([draw[name] for draw in draws])
            if rms(value) < 1e-12:
                continue  # zero on paper: the bias of attention keys
            standard_error = sums.std() / len(draws) ** 0.5
            assert (sums.mean() - value.sum()).abs() <= 4 * standard_error, name


class TestBatches:
    def test_every_example_is_in_one_batch_once_and_the_longest_come_first(self):
        examples = tiny.ragged(23)
        found = [batch.numbers for batch in batches(examples, lambda longest: 4, pad_token_id=0)]
        assert sorted(sum(found, ())) == list(range(23))
        lengths = [len(examples[number]) for numbers in found for number in numbers]
        assert lengths == sorted(lengths, reverse=True)

    def test_padding_is_masked_and_never_scored(self):
        batch = collate(tiny.ragged_texts(6), pad_token_id=17)
        for row, length in enumerate(len(example) for example in batch.examples):
            assert batch.inputs["attention_mask"][row].tolist() == [1] * length + [0] * (
                batch.scored.shape[1] - length
            )
            assert (batch.inputs["input_ids"][row, length:] == 17).all()
            assert not batch.scored[row, length:].any()

    @pytest.mark.parametrize("make", [tiny.ragged, tiny.ragged_texts])
    def test_one_example_of_a_batch_is_that_example_alone(self, make):
        examples = make(6)
        batch = collate(examples, pad_token_id=0)
        for index, example in enumerate(examples):
            single, alone = batch.single(index), collate([example], pad_token_id=0)
            assert single.numbers == alone.numbers
            assert single.scored is alone.scored is None or single.scored.equal(alone.scored)
            assert all(torch.equal(single.inputs[k], v) for k, v in alone.inputs.items())
            assert torch.equal(single.outcome, alone.outcome)

    def test_examples_of_different_forms_never_meet(self):
        """Pictures of two sizes, and choices of two counts."""
        examples = [
            tiny.Example(n, {"pixel_values": torch.zeros(1, 3, 4, 4 + 4 * (n % 2))})
            for n in range(5)
        ]
        examples += [
            tiny.Example(n, {"input_ids": torch.ones(1, 2 + n % 3, n, dtype=torch.long)})
            for n in range(5, 12)
        ]
        found = list(batches(examples, lambda longest: 4, pad_token_id=0))
        assert sorted(number for batch in found for number in batch.numbers) == list(range(12))
        for batch in found:
            assert len({example.form for example in batch.examples}) == 1
            if "input_ids" in batch.inputs:
                assert batch.rows == len(batch) * batch.inputs["input_ids"].shape[1]

    def test_patches_of_several_pictures_are_joined(self):
        examples = [
            tiny.Example(
                n,
                {
                    "input_ids": torch.ones(1, n, dtype=torch.long),
                    "pixel_values": torch.full((n, 6), float(n)),
                    "image_grid_thw": torch.tensor([[1, 1, n]]),
                },
            )
            for n in (2, 4)
        ]
        batch = collate(examples, pad_token_id=0)
        assert batch.inputs["pixel_values"][:, 0].tolist() == [2, 2, 4, 4, 4, 4]
        assert batch.inputs["image_grid_thw"].tolist() == [[1, 1, 2], [1, 1, 4]]
        assert batch.inputs["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
        assert batch.single(1).inputs["pixel_values"].tolist() == [[4.0] * 6] * 4
