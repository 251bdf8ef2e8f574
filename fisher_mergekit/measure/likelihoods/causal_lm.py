"""A causal LM: log p(x) = Σ_t log p(x_t | x_<t) over the second to the last token.

Logits are `[b, t, v]`; position t predicts token t + 1. Padding, and the prompt if it is masked, is
not scored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fisher_mergekit.measure.calibration import Row
from fisher_mergekit.measure.encoding import Encoded, Encoder
from fisher_mergekit.measure.likelihoods.positions import CategoricalPositions


class CausalLM(CategoricalPositions):
    """Next-token prediction."""

    name = "causal_lm"
    heads = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    needs_label = False
    has_prompt = True
    is_causal = True

    @classmethod
    def fits(cls, architecture: str, config: Any) -> bool:
        # Vision-language models are called `ForConditionalGeneration`, as encoder-decoders are.
        return super().fits(architecture, config) and not (
            getattr(config, "is_encoder_decoder", architecture.endswith(cls.heads[-1]))
        )

    def classes(self, config: Any) -> int:
        return int(config.get_text_config().vocab_size)

    def encode(self, row: Row, encoder: Encoder) -> Encoded:
        inputs, prompt, _ = encoder.read(row)
        return inputs, *next_tokens(inputs["input_ids"][0], prompt)


def next_tokens(ids: Tensor, prompt: int = 0) -> tuple[Tensor, Tensor]:
    """Return which positions of `ids` `[t]` are scored, and the token that each predicts.

    The last position predicts nothing; a token of the prompt is not scored.
    """
    following = torch.arange(1, len(ids) + 1)
    scored = (following >= prompt) & (following < len(ids))
    return scored, torch.cat([ids[1:], ids.new_zeros(1)])
