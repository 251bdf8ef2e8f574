"""What other implementations measure in a Fisher's place, and that we do not.

Each mistake is written down as it was published, in a few lines and in float64, and named after
what goes wrong. On the same model and data it has to be clearly something else than the loop over
single examples (or a test could not see it), and ours has to be that loop's.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import merge_oracle
import oracles
import pytest
import tiny
import torch
from models import VOCABULARY, write_fishers
from oracles import assert_same_fishers, rms, squared, zeros
from running import merged, recipe_of
from torch import nn
from torch.nn import functional as F
from transformers import BertForSequenceClassification

from fisher_mergekit.errors import MeasureError, PlanningError
from fisher_mergekit.measure.batches import batches
from fisher_mergekit.precision import solve

pytestmark = pytest.mark.slow  # exhaustive: not needed at every change

BATCH = 4
"""So that nine examples are three batches, padded, of which the last is smaller."""


def padded(examples, size=BATCH):
    return batches(examples, lambda longest: size, tiny.PAD)


def add(total, fishers, factor=1.0):
    for name, value in fishers.items():
        total[name] += factor * value


def assert_clearly_different(wrong, expected):
    """Assert that the error of most tensors is a thousand times what ours may be, and of one 5 %.

    Some cannot tell: the bias of attention keys is zero on paper, and that of the classifier sees
    only predictions.
    """
    assert set(wrong) <= set(expected)
    errors = [rms(value - expected[name]) / rms(expected[name]) for name, value in wrong.items()]
    assert sorted(errors)[len(errors) // 4] > 0.01
    assert max(errors) > 0.05


# Classifiers. Each takes a model in float64, and returns what it calls a Fisher.


def labels_are_averaged_before_the_square(model, examples):
    """Bloomberg's dataless-model-merging and MergeBench, "soft": Σ_y p_y ∇ log p_y is zero."""
    total, count = zeros(model), 0
    for batch in padded(examples):
        log_p = model(**batch.inputs).logits.log_softmax(-1)
        loss = -(log_p.detach().exp() * log_p).sum(-1).mean()
        add(total, squared(oracles.gradients(loss, model)))
        count += 1
    return {name: value / count for name, value in total.items()}


def labels_and_examples_are_summed_before_the_square(model, examples):
    """MergeLM and FusionBench: (Σ_batch Σ_y √p_y ∇ log p_y)² keeps all the cross terms."""
    total = zeros(model)
    for batch in padded(examples):
        log_p = model(**batch.inputs).logits.log_softmax(-1)
        loss = (log_p.detach().exp().sqrt() * log_p).sum()
        add(total, squared(oracles.gradients(loss, model)), 1 / len(examples))
    return total


def labels_are_summed_before_the_square(model, examples):
    """The same, one example at a time: the cross terms between labels remain."""
    total = zeros(model)
    for batch in padded(examples, 1):
        log_p = model(**batch.inputs).logits.log_softmax(-1)
        loss = (log_p.detach().exp().sqrt() * log_p).sum()
        add(total, squared(oracles.gradients(loss, model)), 1 / len(examples))
    return total


def examples_are_averaged_before_the_square(model, examples):
    """dataless-model-merging and MergeBench, empirical: a batch's mean loss, squared."""
    total, count = zeros(model), 0
    for batch in padded(examples):
        loss = F.cross_entropy(model(**batch.inputs).logits, batch.outcome)
        add(total, squared(oracles.gradients(loss, model)))
        count += 1
    return {name: value / count for name, value in total.items()}


def only_the_likeliest_label_counts(model, examples):
    """dataless-model-merging and MergeBench, "hard": not a draw from the model."""
    total = zeros(model)
    for batch in padded(examples, 1):
        log_p = model(**batch.inputs).logits[0].log_softmax(-1)
        add(total, squared(oracles.gradients(log_p.max(), model)), 1 / len(examples))
    return total


def batches_are_counted_as_examples(model, examples):
    """dataless-model-merging: a sum over examples, divided by the number of batches."""
    count = len(list(padded(examples)))
    exact = oracles.exact_classifier(model, examples)
    return {name: value * (len(examples) / count) for name, value in exact.items()}


def padding_is_attended_to(model, examples):
    """dataless-model-merging: padded tokens count as any others."""
    total = zeros(model)
    for batch in padded(examples):
        for row in batch.inputs["input_ids"]:
            log_p = model(input_ids=row[None]).logits[0].log_softmax(-1)
            for y in range(len(log_p)):
                gradients = squared(oracles.gradients(log_p[y], model))
                add(total, gradients, float(log_p[y].detach().exp()) / len(examples))
    return total


def dropout_is_active(model, examples):
    """omnimergekit: `model.train()`, which gradient checkpointing asks for."""
    torch.manual_seed(0)
    total = zeros(model)
    for batch in padded(examples, 1):
        log_p = model.train()(**batch.inputs).logits[0].log_softmax(-1)
        for y in range(len(log_p)):
            gradients = squared(oracles.gradients(log_p[y], model))
            add(total, gradients, float(log_p[y].detach().exp()) / len(examples))
    return total


def the_forward_pass_has_no_gradient(model, examples):
    """mergelib: a forward pass under `no_grad`; `requires_grad_` comes too late."""
    total = zeros(model)
    for batch in padded(examples, 1):
        with torch.no_grad():
            log_p = model(**batch.inputs).logits[0].log_softmax(-1)
        log_p.requires_grad_(True).max().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                total[name] += parameter.grad.square() / len(examples)
    return total


def the_weights_move_meanwhile(model, examples):
    """MergeBench: the optimizer's step after each batch; here of plain gradient descent."""
    optimizer, total = torch.optim.SGD(model.parameters(), lr=1.0), zeros(model)
    for batch in padded(examples):
        now = oracles.exact_classifier(model, [e for e in examples if e.number in batch.numbers])
        add(total, now, len(batch) / len(examples))
        optimizer.zero_grad()
        F.cross_entropy(model(**batch.inputs).logits, batch.outcome).backward()
        optimizer.step()
    return total


def all_labels_count_alike(model, examples):
    """A mean over the labels instead of the expectation."""
    total = zeros(model)
    for batch in padded(examples, 1):
        log_p = model(**batch.inputs).logits[0].log_softmax(-1)
        for y in range(len(log_p)):
            gradients = squared(oracles.gradients(log_p[y], model))
            add(total, gradients, 1 / len(log_p) / len(examples))
    return total


CLASSIFIER_MISTAKES = (
    labels_are_averaged_before_the_square,
    labels_and_examples_are_summed_before_the_square,
    labels_are_summed_before_the_square,
    examples_are_averaged_before_the_square,
    only_the_likeliest_label_counts,
    batches_are_counted_as_examples,
    padding_is_attended_to,
    dropout_is_active,
    the_forward_pass_has_no_gradient,
    the_weights_move_meanwhile,
    all_labels_count_alike,
)


@pytest.fixture(scope="module")
def subject():
    return tiny.classifier(), tiny.ragged(9)


@pytest.fixture(scope="module")
def exact(subject):
    return oracles.exact_classifier(*subject)


@pytest.fixture(scope="module")
def empirical(subject):
    model, examples = subject
    return oracles.classifier_given(model, examples, {e.number: int(e.outcome) for e in examples})


class TestClassifiers:
    @pytest.mark.parametrize("mistake", CLASSIFIER_MISTAKES, ids=lambda f: f.__name__)
    def test_a_mistake_is_seen(self, subject, exact, mistake):
        model, examples = subject
        wrong = mistake(copy.deepcopy(model).double().eval().requires_grad_(True), examples)
        assert_clearly_different(wrong, exact)

    def test_ours_is_the_expectation_over_labels_of_squares(self, subject, exact):
        model, examples = subject
        assert_same_fishers(tiny.measured(model, examples, batch_size=BATCH), exact)

    def test_ours_has_no_dropout_in_training_mode(self, subject, exact):
        model, examples = subject
        model = copy.deepcopy(model).train()
        assert model.config.hidden_dropout_prob > 0
        assert_same_fishers(tiny.measured(model, examples, batch_size=BATCH), exact)

    def test_ours_has_gradients_where_the_caller_has_none(self, subject, exact):
        model, examples = subject
        with torch.no_grad():
            found = tiny.measured(model, examples, batch_size=BATCH)
        assert_same_fishers(found, exact)

    def test_ours_moves_no_weight(self, subject):
        model, examples = subject
        before = copy.deepcopy(model.state_dict())
        tiny.measured(model, examples, "empirical", batch_size=BATCH)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class TestEmpirical:
    """The label in the data: here too each example's gradient is squared by itself."""

    def test_a_squared_batch_gradient_is_seen(self, subject, empirical):
        model, examples = subject
        wrong = examples_are_averaged_before_the_square(copy.deepcopy(model).double(), examples)
        assert_clearly_different(wrong, empirical)

    def test_positions_squared_apart_are_seen(self, subject, empirical):
        """ASDL: a Linear's diagonal is (g²)ᵀ(a²) over all tokens, without their cross terms."""
        model, examples = subject
        model = copy.deepcopy(model).double().eval().requires_grad_(True)
        wrong = {f"{n}.weight": 0.0 for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        taps = {}

        def keep(module, args, y):
            y.retain_grad()
            taps[module] = args[0], y

        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(keep)
        for batch in padded(examples):
            F.cross_entropy(model(**batch.inputs).logits, batch.outcome, reduction="sum").backward()
            for name, module in model.named_modules():
                if module in taps:
                    a, g = (
                        x.flatten(0, -2).square() for x in (taps[module][0], taps[module][1].grad)
                    )
                    wrong[f"{name}.weight"] += (g.T @ a) / len(examples)
        # Above it most see one token only, the one that is classified: there ASDL is right.
        first = {name: value for name, value in wrong.items() if ".layer.0." in name}
        assert len(first) == 6
        assert_clearly_different(first, empirical)

    def test_ours_is_that_of_the_loop(self, subject, empirical):
        found = tiny.measured(*subject, "empirical", batch_size=BATCH)
        assert_same_fishers(found, empirical)


# Language models.


def log_p_of_tokens(model, batch):
    """Return log p(x_t | x_<t) of the second to the last token, `[b, t - 1]`, padding too."""
    ids = batch.inputs["input_ids"]
    log_p = model(**batch.inputs).logits[:, :-1].log_softmax(-1)
    return log_p.gather(-1, ids[:, 1:, None])[..., 0]


def the_loss_is_a_mean_over_tokens(model, examples):
    """omnimergekit: transformers' own loss; a text of T tokens counts 1/T² of what it should."""
    total = zeros(model)
    for batch in padded(examples, 1):
        loss = model(**batch.inputs, labels=batch.inputs["input_ids"]).loss
        add(total, squared(oracles.gradients(loss, model)), 1 / len(examples))
    return total


def padding_is_scored(model, examples):
    """Labels that are the padded input ids: the model has to predict padding."""
    total = zeros(model)
    for batch in padded(examples):
        for log_p in log_p_of_tokens(model, batch):
            add(total, squared(oracles.gradients(log_p.sum(), model)), 1 / len(examples))
    return total


def only_the_last_column_is_scored(model, examples):
    """MergeBench: the likeliest token after the last column, which of most texts is padding."""
    total = zeros(model)
    for batch in padded(examples):
        log_p = model(**batch.inputs).logits[:, -1].log_softmax(-1).amax(-1)
        add(total, squared(oracles.gradients(log_p.sum(), model)), 1 / len(examples))
    return total


def tokens_are_squared_apart(model, examples):
    """Σ_t (∇ log p_t)² for (Σ_t ∇ log p_t)²: the unit is a token, not a sequence."""
    total = zeros(model)
    for batch in padded(examples, 1):
        for log_p in log_p_of_tokens(model, batch)[0]:
            add(total, squared(oracles.gradients(log_p, model)), 1 / len(examples))
    return total


def texts_are_summed_before_the_square(model, examples):
    """A batch's summed loss, squared."""
    total = zeros(model)
    for batch in padded(examples):
        log_p = log_p_of_tokens(model, batch)[batch.scored[:, :-1]].sum()
        add(total, squared(oracles.gradients(log_p, model)), 1 / len(examples))
    return total


LANGUAGE_MODEL_MISTAKES = (
    the_loss_is_a_mean_over_tokens,
    padding_is_scored,
    only_the_last_column_is_scored,
    tokens_are_squared_apart,
    texts_are_summed_before_the_square,
)


@pytest.fixture(scope="module")
def texts():
    return tiny.causal_lm("tied Qwen2"), tiny.ragged_texts(9)


@pytest.fixture(scope="module")
def scored(texts):
    model, examples = texts
    ids = {e.number: tiny.ids_of(e) for e in examples}
    return oracles.causal_lm_given(model, examples, ids)


class TestLanguageModels:
    @pytest.mark.parametrize("mistake", LANGUAGE_MODEL_MISTAKES, ids=lambda f: f.__name__)
    def test_a_mistake_is_seen(self, texts, scored, mistake):
        model, examples = texts
        wrong = mistake(copy.deepcopy(model).double().eval().requires_grad_(True), examples)
        assert_clearly_different(wrong, scored)

    def test_ours_squares_the_sum_over_the_tokens_of_one_text(self, texts, scored):
        found = tiny.measured(*texts, "empirical", batch_size=BATCH)
        assert_same_fishers(found, scored)


class TestExamplesThatFail:
    """omnimergekit prints the error, goes on, and divides by the number of those that did not."""

    def test_leaving_one_out_is_seen(self):
        model, examples = tiny.classifier(), tiny.ragged(9)
        assert_clearly_different(
            oracles.exact_classifier(model, examples[:4]),
            oracles.exact_classifier(model, examples[:5]),
        )

    @pytest.mark.parametrize("place", [0, 4, 8])
    def test_ours_goes_no_further(self, place):
        examples = tiny.ragged(9)
        examples[place] = tiny.labelled(place, [VOCABULARY] * 5, 0)  # no such token
        with pytest.raises(MeasureError, match=f"fails on example {place} "):
            tiny.measured(tiny.classifier(), examples, batch_size=BATCH)

    @pytest.mark.parametrize("place", [0, 4, 8])
    def test_ours_does_not_average_infinity_away(self, place):
        model, examples = tiny.classifier(), tiny.ragged(9)
        rare = VOCABULARY - 1
        assert not any(rare in tiny.ids_of(e) for e in examples)
        with torch.no_grad():
            model.get_input_embeddings().weight[rare] = torch.inf
        examples[place] = tiny.labelled(place, [1, rare], 0)
        with pytest.raises(MeasureError, match="not finite"):
            tiny.measured(model, examples, batch_size=BATCH, fast=False)


class TestMerging:
    """What goes wrong with right Fishers."""

    def test_an_absolute_floor_swamps_a_language_models_fisher(self):
        """The first release: max(F, 1e-6), where a large language model's Fisher is 1e-18."""
        generator = torch.Generator().manual_seed(0)
        thetas = list(torch.randn(2, 1000, generator=generator))
        fishers = list(1e-18 * torch.randn(2, 1000, generator=generator).exp().square())
        scales = [rms(f) for f in fishers]
        expected = merge_oracle.merge_tensor(thetas, fishers, [1, 1], scales)
        found = solve("fisher", thetas, [(f,) for f in fishers], [1, 1], scales=scales)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)

        floored = [f.clamp_min(1e-6) for f in fishers]
        wrong = merge_oracle.merge_tensor(thetas, floored, [1, 1], [1, 1], floor=0)
        torch.testing.assert_close(wrong, (thetas[0] + thetas[1]).double() / 2)
        assert rms(wrong - expected) > 0.1 * rms(expected)

    @pytest.mark.parametrize(
        ("key", "value"), [("estimator", "empirical"), ("max_length", 3)], ids=str
    )
    def test_fishers_measured_in_different_ways_are_not_mixed(self, tmp_path, key, value):
        """None of those above looks at how it was measured; the merge is another one."""
        folders = [tiny.save_model(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
        measured_in = {"estimator": "exact", "max_length": 9}
        for folder in folders:
            measure(folder, **measured_in)
        alike = merged(recipe_of(*folders), tmp_path / "alike")
        measure(folders[1], **{**measured_in, key: value})
        with pytest.raises(PlanningError, match=f"measured with different {key}"):
            merged(recipe_of(*folders), tmp_path / "mixed")
        insisting = recipe_of(*folders, parameters={"allow_mixed": True})
        mixed = merged(insisting, tmp_path / "insisted")
        assert max(rms(mixed[name] - value) / rms(value) for name, value in alike.items()) > 0.01


def measure(folder, *, estimator, max_length):
    """Measure a tiny classifier on texts that are cut, and write its sidecar."""
    model = BertForSequenceClassification.from_pretrained(folder)
    cut = [
        replace(e, inputs={"input_ids": e.inputs["input_ids"][:, :max_length]})
        for e in tiny.ragged(9, classes=2)
    ]
    fishers = tiny.measured(model, cut, estimator)
    write_fishers(folder, fishers, estimator=estimator, max_length=max_length)
