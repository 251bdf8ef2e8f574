"""A sequence-to-sequence LM: log p(target | source) = Σ_t log p(y_t | y_<t, source).

Logits are `[b, n, v]`, one row a token of the target, its end token included. The decoder reads the
target one place to the right, and the model itself says how it does that from labels.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from fisher_mergekit.errors import CalibrationError, CheckpointError
from fisher_mergekit.measure.calibration import Row
from fisher_mergekit.measure.encoding import Encoded, Encoder
from fisher_mergekit.measure.likelihoods.positions import CategoricalPositions


class Seq2SeqLM(CategoricalPositions):
    """Next-token prediction of a target, given a source."""

    name = "seq2seq_lm"
    heads = ("ForConditionalGeneration", "MTModel", "EncoderDecoderModel")
    needs_label = False
    is_causal = True

    @classmethod
    def fits(cls, architecture: str, config: Any) -> bool:
        return super().fits(architecture, config) and getattr(config, "is_encoder_decoder", True)

    def classes(self, config: Any) -> int:
        return int(config.get_text_config(decoder=True).vocab_size)

    def encode(self, row: Row, encoder: Encoder) -> Encoded:
        if not isinstance(row.text, tuple):
            raise CalibrationError(
                "a sequence-to-sequence model reads a pair: `text: [SOURCE, TARGET]`."
            )
        source, target = row.text
        inputs = encoder.tensors(encoder.tokens(source))
        labels = torch.tensor([encoder.tokens(text_target=target)["input_ids"]])
        inputs["decoder_input_ids"] = decoder_inputs(encoder.config, labels)
        return inputs, torch.ones_like(labels[0], dtype=torch.bool), labels[0]


def decoder_inputs(config: Any, labels: Tensor) -> Tensor:
    """Return what the decoder reads to predict `labels` `[1, n]`, as the model itself makes it.

    Raises:
        CheckpointError: the configuration does not say what a target begins with.
    """
    first = getattr(config, "decoder_start_token_id", None)
    model_class: Any = getattr(transformers, str((config.architectures or [None])[0]), None)
    if hasattr(model_class, "prepare_decoder_input_ids_from_labels"):
        # The method needs no more of the model than its configuration.
        bare = model_class.__new__(model_class)
        bare.__dict__["config"] = config
        try:
            shifted: Tensor = bare.prepare_decoder_input_ids_from_labels(labels)
        except (AttributeError, TypeError, ValueError):
            if first is not None:
                raise  # Not for want of it: BART begins with another token.
        else:
            return shifted
    if first is None:
        raise CheckpointError(
            "config.json has no decoder_start_token_id, the token that every target begins with; "
            "add it."
        )
    return torch.cat([torch.full_like(labels[:, :1], first), labels[:, :-1]], dim=1)
