"""What a measurement allocates, beside an ordinary training step without an optimizer.

Counted by the profiler, not by the process's size, so that it is the same number everywhere. The
accumulators are made before, with the session, and not counted.
"""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fisher_mergekit.measure.batches import collate

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
