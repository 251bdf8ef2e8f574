"""Rotary positions that adapt to a text's length: to its own, whatever was read before it."""

import copy

import pytest
import tiny
import torch

ORIGINAL = 4
DYNAMIC = {
    "rope_type": "dynamic",
    "factor": 4.0,
    "rope_theta": 10.0,
    "original_max_position_embeddings": ORIGINAL,
}


@pytest.fixture
def model():
    architecture, sizes = tiny.CAUSAL_LMS["untied Llama"]
    return tiny.build(
        architecture, sizes, rope_parameters=DYNAMIC, max_position_embeddings=ORIGINAL
    )


def alone(model, examples):
    """Return the mean of the Fishers that every example has in a model that has read nothing."""
    fishers = [tiny.measured(copy.deepcopy(model), [e], "empirical") for e in examples]
    return {name: sum(f[name] for f in fishers) / len(fishers) for name in fishers[0]}


def test_a_text_is_read_as_if_it_were_the_first(model):
    examples = tiny.ragged_texts(6)
    assert {len(e) > ORIGINAL for e in examples} == {True, False}
    expected = alone(model, examples)
    found = tiny.measured(model, examples, "empirical", batch_size=3, fast=False)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5 * float(value.max()))


def test_its_length_counts(model):
    """Otherwise the test above would say nothing."""
    ids = torch.tensor([[5, 7, 3, 9, 2, 8, 4, 6, 1]])
    before = model(input_ids=ids[:, :6]).logits
    model(input_ids=ids)
    assert not torch.allclose(model(input_ids=ids[:, :6]).logits, before, rtol=1e-3)
