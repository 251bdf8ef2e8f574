"""A language model that sees what it is to predict is refused; one that does not is not."""

from __future__ import annotations

import pytest
import tiny
import torch
from models import FAMILIES, VOCABULARY

from fisher_mergekit.errors import MeasureError
from fisher_mergekit.measure.batches import collate
from fisher_mergekit.measure.causality import check_causal

pytestmark = pytest.mark.slow  # exhaustive: not needed at every change

BERT = FAMILIES["bert"][1]
XLNET = {"vocab_size": VOCABULARY, "d_model": 8, "n_layer": 2, "n_head": 2, "d_inner": 16}


def bert(**config):
    return tiny.build("BertLMHeadModel", BERT, **config)


def test_bert_as_a_decoder_is_measured():
    assert tiny.measured(bert(is_decoder=True), tiny.ragged_texts(4), fast=False)


@pytest.mark.parametrize("build", [bert, lambda: tiny.build("XLNetLMHeadModel", XLNET)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_looks_ahead_is_refused(build, dtype):
    with pytest.raises(MeasureError, match="sees the tokens that follow") as refusal:
        tiny.measured(build().to(dtype), tiny.ragged_texts(4), "empirical")
    assert '`"is_decoder": true`' in str(refusal.value)


@pytest.mark.parametrize("ids", [[1, 2, 3, 4, 5, 7], [1, 2, 3, 4, 4, 5], [7, 2, 3, 7, 7, 1]])
def test_any_second_half_that_can_be_changed_is(ids):
    seen = []

    def model(batch):
        seen.append(batch.inputs["input_ids"][0].tolist())
        return torch.ones(1, 6, 2)

    check_causal(model, collate([tiny.text(0, ids)], tiny.PAD), "Model")
    before, after = seen
    assert before == ids
    assert after[:3] == ids[:3]
    assert after[3:] != ids[3:]


@pytest.mark.parametrize("ids", [[5], [5, 5, 5, 5]])
def test_a_text_that_says_nothing_is_let_through(ids):
    batch = collate([tiny.text(0, ids)], tiny.PAD)
    check_causal(lambda batch: pytest.fail("nothing could be seen"), batch, "Model")
