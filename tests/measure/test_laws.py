"""What must hold of any Fisher, whatever the model, and what well-known mistakes would give."""

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
            for total in session._taps.totals.values():
                total.zero_()
            totals = session.run(examples, 6)
            draws.append({n: totals[p].double().sum() for n, p in model.named_parameters()})
        for name, value in exact.items():
            sums = torch.stack([draw[name] for draw in draws])
            if rms(value) < 1e-12:
                continue  # zero on paper: the bias of attention keys
            standard_error = sums.std() / len(draws) ** 0.5
            assert (sums.mean() - value.sum()).abs() <= 4 * standard_error, name


def mistaken(subject, formula):
    """Apply a formula to [example][class] gradients in float64; return a Fisher by name."""
    model, examples = subject
    log_ps, gradients = [], []

    def one(model, batch):
        log_p = model(**batch.inputs).logits[0].log_softmax(-1)
        log_ps.append(log_p.detach())
        gradients.append([oracles.gradients(log_p[y], model) for y in range(len(log_p))])
        return {}

    oracles.mean_over_examples(model, examples, one)
    p = torch.stack(log_ps).exp()
    return {
        name: formula(p, torch.stack([torch.stack([g[name] for g in row]) for row in gradients]))
        for name in dict(model.named_parameters())
    }


def weighted(weights, gradients):
    """Multiply `[b, y]` weights into `[b, y, …]` gradients."""
    return weights.reshape(*weights.shape, *[1] * (gradients.dim() - 2)) * gradients


MISTAKES = {
    "a detached expectation of the score, identically zero": lambda p, g: (
        weighted(p, g).sum(1).square().mean(0)
    ),
    "the square of the batch's summed gradient": lambda p, g: (
        weighted(p.sqrt(), g).sum(0).square().sum(0) / len(p)
    ),
    "√p inside, squared after summing labels and examples": lambda p, g: (
        weighted(p.sqrt(), g).sum((0, 1)).square() / len(p)
    ),
    "√p inside, squared after summing labels: cross terms between labels": lambda p, g: (
        weighted(p.sqrt(), g).sum(1).square().mean(0)
    ),
    "the most likely label only": lambda p, g: (
        g[torch.arange(len(p)), p.argmax(1)].square().mean(0)
    ),
    "the mean over batches instead of examples": lambda p, g: (
        weighted(p, g.square()).sum((0, 1)) / -(-len(p) // 5)
    ),
    "all labels alike": lambda p, g: g.square().mean((0, 1)),
}


@pytest.fixture(scope="module")
def found(subject):
    return tiny.measured(*subject, batch_size=5)


class TestKnownMistakes:
    """Each is in some published implementation; on the same data each gives something else."""

    def test_the_definition_is_what_we_compute(self, subject, found):
        expected = mistaken(subject, lambda p, g: weighted(p, g.square()).sum(1).mean(0))
        assert_same_fishers(found, expected)

    @pytest.mark.parametrize("mistake", MISTAKES)
    def test_we_do_not_compute(self, subject, found, mistake):
        wrong = mistaken(subject, MISTAKES[mistake])
        for name, value in found.items():
            if ".key.bias" not in name:  # zero on paper, and in every mistake
                assert rms(value - wrong[name]) > 1e-2 * rms(value), name

    def test_tokens_of_a_sequence_are_not_squared_apart(self, language_subject):
        """(Σ_t ∇ℓ_t)² and Σ_t (∇ℓ_t)² differ by the cross terms, which `sequence` keeps."""
        model, examples = language_subject[0], tiny.ragged_texts(12)
        found = tiny.measured(model, examples, "empirical")

        def apart(model, batch):
            log_p = model(**batch.inputs).logits[0].log_softmax(-1)
            total, ids = oracles.zeros(model), batch.inputs["input_ids"][0]
            for t in range(1, len(ids)):
                for name, g in oracles.gradients(log_p[t - 1, ids[t]], model).items():
                    total[name] += g.square()
            return total

        wrong = oracles.mean_over_examples(model, examples, apart)
        for name, value in found.items():
            assert rms(value - wrong[name]) > 1e-2 * rms(value), name

    def test_a_longer_text_counts_by_its_sum_not_its_mean(self, language_subject):
        """Token-mean losses shrink squares by 1/T²; a sum keeps them."""
        model = language_subject[0]
        (longest,) = [e for e in tiny.ragged_texts(12) if len(e) == 9][:1]
        found = tiny.measured(model, [longest], "empirical")
        expected = oracles.causal_lm_given(model, [longest], {longest.number: tiny.ids_of(longest)})
        assert_same_fishers(found, expected)


class TestBatches:
    def test_every_example_is_in_one_batch_once_and_the_longest_come_first(self):
        examples = tiny.ragged(23)
        found = [batch.numbers for batch in batches(examples, 4, pad_token_id=0)]
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
        found = list(batches(examples, 4, pad_token_id=0))
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
