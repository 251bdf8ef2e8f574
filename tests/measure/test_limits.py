"""`batch_size: auto`: batches by tokens, smaller ones where memory runs out, the same result."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import oracles
import pytest
import tiny
import torch
from oracles import assert_same_fishers
from torch import nn

from fisher_mergekit.errors import MeasureError
from fisher_mergekit.measure import limits, squares
from fisher_mergekit.measure.batches import batches
from fisher_mergekit.measure.layers import local
from fisher_mergekit.measure.limits import GPU_TOKENS, Limit

pytestmark = pytest.mark.slow  # exhaustive: not needed at every change

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def subject():
    return tiny.classifier(), tiny.ragged(12)


@pytest.fixture(scope="module")
def expected(subject):
    return tiny.measured(*subject, batch_size=12)


@pytest.mark.parametrize("tokens", [1, 9, 20, 1000])
def test_batches_are_filled_by_tokens(tokens):
    examples = tiny.ragged(23)
    limit = Limit(float("inf"), tokens)
    found = list(batches(examples, limit.count, tiny.PAD))
    assert sorted(n for batch in found for n in batch.numbers) == list(range(23))
    sizes = [batch.inputs["input_ids"].shape for batch in found]
    assert all(b == 1 or b * t <= tokens for b, t in sizes)
    # No batch but the last had room for one more of its own length.
    assert all((b + 1) * t > tokens for b, t in sizes[:-1])


def test_a_picture_is_as_many_tokens_as_it_has_patches():
    picture = tiny.Example(0, {"pixel_values": torch.zeros(1, 3, 224, 224)})
    assert Limit(float("inf"), 1000).count(picture) == 1000 // 197
    assert Limit.of("auto", torch.device("cuda")).count(picture) == GPU_TOKENS // 197


def test_a_number_is_a_number_of_examples():
    assert Limit.of(5, CPU).count(tiny.labelled(0, [1] * 5000, 0)) == 5


@pytest.mark.parametrize("tokens", [1, 9, 25])
@pytest.mark.parametrize("estimator", ["exact", "sampled", "empirical"])
def test_it_changes_nothing_but_rounding(subject, estimator, tokens, monkeypatch):
    expected = tiny.measured(*subject, estimator, batch_size=12)
    monkeypatch.setattr(limits, "CPU_TOKENS", tokens)
    assert_same_fishers(tiny.measured(*subject, estimator, batch_size="auto"), expected)


class Device:
    """Memory for so many examples: fails at the n-th operation of a batch that has more."""

    def __init__(self, monkeypatch, *, examples: int, adding: int | None):
        self.examples, self.adding, self.failures = examples, adding, 0
        self.logits: list[weakref.ref] = []
        self.count = 0
        add_squares = squares.add_squares

        def add(total, contributions):
            self.count += 1
            if self.is_full and self.count == adding:
                self.fail()
            add_squares(total, contributions)

        monkeypatch.setattr(squares, "add_squares", add)

    def fail(self):
        self.failures += 1
        raise torch.OutOfMemoryError("out of memory")

    def limit(self, session):
        logits = session.logits

        def limited(batch):
            if len(batch) == 1:  # an example alone, to compare with
                return logits(batch)
            self.is_full, self.count = len(batch) > self.examples, 0
            if self.is_full and self.adding is None:
                self.fail()
            found = logits(batch)
            assert not any(old() is not None for old in self.logits), "a failed batch is kept"
            if self.is_full:
                self.logits.append(weakref.ref(found))
            return found

        session.logits = limited
        return session


@pytest.mark.parametrize("adding", [None, 1, 20])
def test_a_batch_that_does_not_fit_is_counted_once(subject, expected, monkeypatch, adding):
    """Memory for five: twelve examples are tried, then six, then three. Nothing is left behind."""
    model, examples = subject
    device = Device(monkeypatch, examples=5, adding=adding)
    session = device.limit(tiny.session_for(model))
    steps = []
    gc.disable()  # what a failed batch held has to go by itself
    try:
        totals = session.run(examples, "auto", steps.append)
    finally:
        gc.enable()
    assert device.failures == 2
    assert next(step for step in steps if step) == 3
    assert sum(steps) == 12
    assert_same_fishers({n: totals[p] for n, p in model.named_parameters()}, expected)


def test_a_later_batch_that_does_not_fit(subject, expected, monkeypatch):
    """What has been added before it is given up, not counted twice."""
    model, examples = subject
    monkeypatch.setattr(limits, "CPU_TOKENS", 9 * 3)  # 3 of the longest, then ever more
    device = Device(monkeypatch, examples=3, adding=7)
    session = device.limit(tiny.session_for(model))
    steps = []
    totals = session.run(examples, "auto", steps.append)
    assert device.failures > 0
    assert min(steps) < 0
    assert sum(steps) == 12
    assert_same_fishers({n: totals[p] for n, p in model.named_parameters()}, expected)


@pytest.mark.parametrize(
    ("memory", "size", "phrase"),
    [
        (3, 5, "memory runs out on cpu with a batch of 5. Use `batch_size: auto`. Less is needed"),
        (2, "auto", "while the rules are verified on three examples. Less is needed with"),
    ],
)
def test_what_cannot_be_mended_is_said(subject, monkeypatch, memory, size, phrase):
    model, examples = subject
    session = Device(monkeypatch, examples=memory, adding=None).limit(tiny.session_for(model))
    with pytest.raises(MeasureError, match=phrase):
        session.run(examples, size)


class TwoInputs(nn.Module):
    """A module of two tensors, for which there is no rule: it runs again for each example."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(tiny.VOCABULARY, 4)
        self.mix = nn.Bilinear(4, 4, 3)

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids)
        y = self.mix(x, x.tanh()) * attention_mask.unsqueeze(-1)
        return SimpleNamespace(logits=y.sum(1))


def test_a_rule_that_holds_gradients_of_all_examples_limits_the_batch(monkeypatch):
    """Or its parameters would be left to the slow loop in the first large batch."""
    model, examples = TwoInputs(), tiny.ragged(12)
    monkeypatch.setattr(local, "MOST_ELEMENTS", 5 * model.mix.weight.numel())
    for size in (12, "auto"):
        steps = []
        session = tiny.session_for(model)
        totals = session.run(examples, size, steps.append)
        assert session.loose == ()
        assert set(session.again) == {"mix.weight", "mix.bias"}
        assert steps == [5, 5, 2]
        found = {n: totals[p] for n, p in model.named_parameters()}
        assert_same_fishers(found, oracles.exact_classifier(model, examples))
