"""A language model must not see the tokens that it predicts.

transformers has classes for language models that do when their configuration forgets to say that
they must not (`BertLMHeadModel` without `is_decoder`), or that need more inputs to be causal
(XLNet's permutations). What such a model computes is no p(x_t | x_<t), and nothing else would show
it: its Fisher would be a right measurement of the wrong thing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fisher_mergekit.errors import MeasureError
from fisher_mergekit.measure.batches import Batch, Example, collate

TOLERANCE = 1e-4
"""Relative; a half that has not changed gives the same numbers but for rounding."""


def check_causal(logits_of: Callable[[Batch], Tensor], batch: Batch, architecture: str) -> None:
    """Change the second half of a text, and see whether the predictions in the first half move.

    Args:
        logits_of: the model, `[1, n, v]` of one example.
        batch: examples as they are measured; the first of them is used.
        architecture: the model's class, for the message.

    Raises:
        MeasureError: they do.
    """
    example = batch.examples[0]
    name = "decoder_input_ids" if "decoder_input_ids" in example.inputs else "input_ids"
    ids = example.inputs[name]
    half = ids.shape[-1] // 2
    changed = torch.cat([ids[:, :half], ids[:, :1].expand_as(ids[:, half:])], dim=1)
    if half < 1 or torch.equal(changed, ids):
        return
    with torch.no_grad():
        before, after = (
            logits_of(_alone(replace(example, inputs={**example.inputs, name: x}), batch))
            .double()[0, :half]
            .flatten(1)
            for x in (ids, changed)
        )
    # A mixture of experts can send single tokens to another expert because of rounding; a model
    # that sees what follows differs everywhere.
    moved = ((after - before).norm(dim=1) / before.norm(dim=1)).median()
    if moved > max(TOLERANCE, 2 * torch.finfo(batch.dtype).eps):
        raise MeasureError(
            f"{architecture} sees the tokens that follow: its predictions in the first half of a "
            "text change with the second half. So it gives no log p(x_t | x_<t), which a language "
            "model is measured by. If it was trained as one, say so in its config.json "
            '(`"is_decoder": true`); if it was trained to fill in masked words, save and measure '
            "it with its masked head, `…ForMaskedLM`."
        )


def _alone(example: Example, batch: Batch) -> Batch:
    return collate([example], batch.pad_token_id).to(batch.device, batch.dtype)
