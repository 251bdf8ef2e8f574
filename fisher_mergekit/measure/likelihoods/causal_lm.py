"""A causal LM: log p(x) = Σ_t log p(x_t | x_<t) over the second to the last token.

Logits are `[b, t, v]`; position t predicts token t + 1. Padding, and the prompt if it is masked, is
not scored. Drawing each token from the model given the true prefix makes the cross terms between
positions vanish in expectation: the squared sequence gradient of a sampled outcome is then an
unbiased estimate of the sum of token-level Fishers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fisher_mergekit.errors import MeasureError
from fisher_mergekit.measure.batches import Batch
from fisher_mergekit.measure.likelihoods.positions import CategoricalPositions


class CausalLM(CategoricalPositions):
    """Next-token prediction."""

    name = "causal_lm"
    heads = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    default_estimator = "sampled"
    needs_label = False

    @classmethod
    def fits(cls, architecture: str, config: Any) -> bool:
        # Vision-language models are called `ForConditionalGeneration`, as encoder-decoders are.
        return super().fits(architecture, config) and not (
            getattr(config, "is_encoder_decoder", architecture.endswith(cls.heads[-1]))
        )

    def check(self, config: Any, estimator: str) -> None:
        if estimator == "exact":
            raise MeasureError(
                "the exact estimator would need one backward pass for each of the "
                f"{config.get_text_config().vocab_size:,} tokens of the vocabulary. Use "
                "`estimator: sampled`, which is unbiased and needs one."
            )

    def target(
        self, inputs: dict[str, Tensor], prompt: int, label: int | None
    ) -> tuple[Tensor | None, Tensor | None]:
        return next_tokens(inputs["input_ids"][0], prompt)

    def factor(self, logits: Tensor, batch: Batch) -> Iterator[Tensor]:
        raise NotImplementedError("`check` refuses the exact estimator")


def next_tokens(ids: Tensor, prompt: int = 0) -> tuple[Tensor, Tensor]:
    """Return which positions of `ids` `[t]` are scored, and the token that each predicts.

    The last position predicts nothing; a token of the prompt is not scored.
    """
    following = torch.arange(1, len(ids) + 1)
    scored = (following >= prompt) & (following < len(ids))
    return scored, torch.cat([ids[1:], ids.new_zeros(1)])
