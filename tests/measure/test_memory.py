"""What a measurement allocates, beside an ordinary training step without an optimizer.

Counted by the profiler, not by the process's size, so that it is the same number everywhere. The
accumulators are made before, with the session, and not counted.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fisher_mergekit.measure.batches import collate
from fisher_mergekit.measure.measured import Measured, needs_of
from fisher_mergekit.measure.stored import stored
from fisher_mergekit.sidecar.header import Settings
from fisher_mergekit.sidecar.layout import Group

pytestmark = pytest.mark.slow  # exhaustive: not needed at every change

BUFFER = 2 * 2**20
"""What may be added to everything: squares of one small block, ids, lists of examples."""


def peak(run) -> int:
    """Return the most bytes that were allocated at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    now = most = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=2000,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=1024,
        num_labels=2,
    )
    return transformers.BertForSequenceClassification(config)


@pytest.fixture(scope="module")
def examples():
    generator = torch.Generator().manual_seed(0)
    draw = torch.randint(1, 2000, (16, 64), generator=generator).tolist()
    return [tiny.labelled(number, ids, number % 2) for number, ids in enumerate(draw)]


def step(model: nn.Module, examples) -> None:
    batch = collate(examples, tiny.PAD)
    model.requires_grad_(True).zero_grad(set_to_none=True)
    model(**batch.inputs, labels=batch.outcome).loss.backward()


def test_a_batch_takes_no_more_than_an_ordinary_step(model, examples):
    expected = peak(lambda: step(model, examples))
    model.zero_grad(set_to_none=True)
    session = tiny.session_for(model)
    session.verify(examples)
    assert session.loose == ()
    batch = collate(examples, tiny.PAD)
    assert peak(lambda: session._add_batch(batch)) <= expected + BUFFER


def test_verification_takes_no_more_than_one_copy_of_the_model(model, examples):
    """One example's gradients, and the square of one of them; no second accumulator."""
    model.zero_grad(set_to_none=True)
    session = tiny.session_for(model)
    sizes = [4 * p.numel() for p in model.parameters()]
    activations = peak(lambda: model(**collate(examples[:3], tiny.PAD).inputs))
    assert peak(lambda: session.verify(examples)) <= sum(sizes) + max(sizes) + activations + BUFFER


def grams(model) -> int:
    """Bytes of one Gram for each distinct input of BERT, and of the tables' counts."""
    layer = model.bert.encoder.layer[0]
    hidden, wide = layer.intermediate.dense.in_features, layer.output.dense.in_features
    layers = len(model.bert.encoder.layer)
    tables = sum(m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding))
    # Queries with keys and values, what comes of them, two of the block; pooler and classifier.
    return 4 * (layers * (3 * hidden**2 + wide**2) + 2 * hidden**2 + tables)


def gram_session(model):
    return tiny.session_for(model, squares=False, factors=False)


def test_a_gram_takes_one_matrix_for_each_distinct_input_and_no_fisher(model, examples):
    batch = collate(examples, tiny.PAD)
    with torch.no_grad():
        forward = peak(lambda: model(**batch.inputs))

    def run():
        session = gram_session(model)
        assert not session._taps.totals
        session.run(examples, len(examples))

    wide = batch.inputs["input_ids"].numel() * 1024 * 4  # the widest rows, without their padding
    assert peak(run) <= forward + grams(model) + wide + BUFFER


def subject_of(model):
    groups = tuple(
        Group((SimpleNamespace(name=name, count=p.numel()),), {name: p.shape})
        for name, p in model.named_parameters()
    )
    return SimpleNamespace(model=model, groups=groups)


@pytest.mark.parametrize("kinds", [("gram",), ("kfac",), ("gram", "kfac")])
def test_the_last_kind_that_is_written_takes_the_sums_themselves(model, examples, kinds):
    session = tiny.session_for(model, squares=False, factors="kfac" in kinds)
    session.run(examples, 16)
    settings = Settings(estimator="none", unit="none", likelihood="none", examples=len(examples))
    measured = Measured(subject_of(model), {}, session.factors, settings, {})
    sums = {group.leader: group.total.clone() for group in session.factors.groups.values()}
    rows = {group.leader: group.rows for group in session.factors.groups.values()}
    for place, kind in enumerate(kinds, start=1):
        measured.later = needs_of(kinds[place:])
        written = []
        most = peak(lambda kind=kind, to=written: to.append(stored(kind, measured)))
        assert most <= (BUFFER if place == len(kinds) else grams(model) + BUFFER)
        (found,) = written
        for parameter, name in session.factors.parameters.items():
            group = session.factors.groups.get(parameter)
            if group is None:
                assert name in found.undescribed
                continue
            divisor = len(examples) if kind == "gram" else rows[group.leader]
            torch.testing.assert_close(
                found.tensors[found.factors[name].inputs], sums[group.leader] / divisor
            )
