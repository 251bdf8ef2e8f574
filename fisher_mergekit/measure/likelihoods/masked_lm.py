"""A masked LM: log p = Σ_t log p(x_t | the text with some tokens masked) over the masked tokens t.

15 % of an example's tokens, and at least one, are drawn by the seed and the example's number, and
each becomes the mask token. Special tokens are never drawn. (In training a fifth of them keep
their word or get a wrong one, so that a model does not rely on the mask; measuring has no use for
that.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fisher_mergekit.errors import CalibrationError
from fisher_mergekit.measure.calibration import Row
from fisher_mergekit.measure.encoding import Encoded, Encoder
from fisher_mergekit.measure.likelihoods.draws import MASKS, uniforms
from fisher_mergekit.measure.likelihoods.positions import CategoricalPositions

SHARE = 0.15
"""Of the tokens that are masked, as BERT was trained with."""


class MaskedLM(CategoricalPositions):
    """The words under the masks."""

    name = "masked_lm"
    heads = ("ForMaskedLM",)
    needs_label = False
    has_prompt = True

    def classes(self, config: Any) -> int:
        return int(config.vocab_size)

    def encode(self, row: Row, encoder: Encoder) -> Encoded:
        mask = encoder.tokenizer.mask_token_id
        if mask is None:
            raise CalibrationError(
                "this model's tokenizer has no mask token; put the model's own tokenizer files "
                "into its folder."
            )
        inputs, prompt, special = encoder.read(row)
        ids = inputs["input_ids"]
        kept = special.clone()
        kept[:prompt] = True
        scored = _drawn(~kept, encoder.calibration.seed, row.number)
        return {**inputs, "input_ids": ids.masked_fill(scored, mask)}, scored, ids[0]


def _drawn(candidates: Tensor, seed: int, number: int) -> Tensor:
    """Choose 15 % of the candidates `[t]`, at least one if there is any."""
    count = int(candidates.sum())
    lottery = uniforms(seed, [number], len(candidates), MASKS)[0]
    lottery[~candidates] = 2.0
    chosen = lottery.argsort()[: max(min(count, 1), round(SHARE * count))]
    return torch.zeros_like(candidates).index_fill_(0, chosen, True)
