"""Rows to examples, by the model's own tokenizer or image processor.

What every head shares is here: tokens of a text, a pair or a chat, and pixels of a picture. What a
head makes of them, and of the labels, it says itself.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
import transformers
import xxhash
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from fisher_mergekit.errors import CalibrationError, CheckpointError, FisherMergekitError
from fisher_mergekit.measure.batches import Example
from fisher_mergekit.measure.calibration import Row
from fisher_mergekit.measure.images import pixels
from fisher_mergekit.recipe import Calibration

LOG = logging.getLogger(__name__)

_INPUTS = ("input_ids", "token_type_ids")

Encoded = tuple[dict[str, Tensor], Tensor | None, Tensor | None]
"""An example's `inputs`, `scored` and `outcome`."""


class EncodedRow(NamedTuple):
    """What a row says, read by the model's tokenizer or image processor.

    Attributes:
        inputs: the model's, `[1, …]` each.
        prompt: how many leading tokens are prompt.
        special: `[t]`, which tokens are no words: those that the tokenizer adds, or calls special,
            but for unknown words; nothing of a picture.
    """

    inputs: dict[str, Tensor]
    prompt: int
    special: Tensor


class Head(Protocol):
    """What a likelihood has to do with rows."""

    def encode(self, row: Row, encoder: Encoder) -> Encoded:
        """Return what an example made of this row gives the model, scores, and observed."""
        ...


@dataclass(frozen=True)
class Encoder:
    """One model's way of reading.

    Attributes:
        config: the model's.
        calibration: how much is read, and what of it is prompt.
        tokenizer: the model's own, or None if it reads no text.
        processor: the model's own image processor, or None if it reads no pictures.
    """

    config: PretrainedConfig
    calibration: Calibration
    tokenizer: Any = None
    processor: Any = None

    @cached_property
    def length(self) -> int:
        """The longest text in tokens."""
        return min(self.calibration.max_length, longest_input(self.tokenizer, self.config))

    @property
    def pad_token_id(self) -> int:
        """What fills up the shorter choices of one example; it is masked."""
        for token in (self.config.pad_token_id, self.tokenizer.pad_token_id):
            if token is not None and token >= 0:
                return int(token)
        return 0

    def read(self, row: Row) -> EncodedRow:
        """Return what a text, pair, chat or picture says."""
        if row.image is not None:
            values = pixels(row.image, self.processor, self.config)
            return EncodedRow({"pixel_values": values}, 0, torch.zeros(0, dtype=torch.bool))
        if row.messages is not None:
            return self._chat(row.messages)
        if isinstance(row.text, list):
            raise CalibrationError(
                f"column {self.calibration.text!r} holds a list of words, which only token "
                "classifiers read."
            )
        if row.choices is not None:
            raise CalibrationError("only multiple-choice models read `choices:`; remove it.")
        first, second = row.text if isinstance(row.text, tuple) else (row.text, None)
        encoded = self.tokens(first, second)
        prompt = self._prompt(encoded, second) if self.calibration.mask_prompt else 0
        return self._reading(encoded, prompt)

    def tokens(self, first: Any = None, second: Any = None, **options: Any) -> Any:
        """Tokenise a text or pair, cut to the longest that is read.

        Raises:
            CalibrationError: there is nothing in it, or the tokenizer cannot do it.
            CheckpointError: the tokenizer knows tokens that the model does not.
        """
        options = {
            "truncation": True,
            "max_length": self.length,
            "return_special_tokens_mask": True,
            **options,
        }
        try:
            encoded = self.tokenizer(first, second, **options)
        except Exception as error:  # Rust panics, assertions, whatever it stumbles over
            raise CalibrationError(f"the tokenizer refuses it: {error}") from None
        ids = encoded["input_ids"]
        if not ids:
            raise CalibrationError("the text has no tokens.")
        text_config = self.config.get_text_config()
        vocabulary = getattr(text_config, "vocab_size", None) or 1 << 62
        if max(ids) >= vocabulary:
            raise CheckpointError(
                f"the tokenizer gives token {max(ids)}, but the model has only {vocabulary} "
                "(vocab_size). They do not belong together; put the model's own tokenizer files "
                "into its folder."
            )
        return encoded

    def tensors(self, encoded: Any) -> dict[str, Tensor]:
        """Return those inputs that the model has, `[1, t]` each."""
        inputs = {name: torch.tensor([encoded[name]]) for name in _INPUTS if name in encoded}
        if getattr(self.config, "type_vocab_size", None) in (None, 0, 1):
            # A generic tokenizer makes them for any model, and GPT-2 would read them as words.
            inputs.pop("token_type_ids", None)
        return inputs

    def _reading(self, encoded: Any, prompt: int = 0) -> EncodedRow:
        known = {*self.tokenizer.all_special_ids} - {self.tokenizer.unk_token_id}
        ids = torch.tensor(encoded["input_ids"])
        added = torch.tensor(encoded["special_tokens_mask"], dtype=torch.bool)
        special = added | torch.isin(ids, torch.tensor([*known], dtype=torch.long))
        return EncodedRow(self.tensors(encoded), prompt, special)

    def _prompt(self, encoded: Any, second: str | None) -> int:
        """Return where the second of a pair begins."""
        if second is None:
            raise CalibrationError(
                "mask_prompt needs to know the prompt: give a pair `text: [PROMPT, COMPLETION]`, "
                "or `messages:`."
            )
        if not self.tokenizer.is_fast:
            raise CalibrationError(
                "mask_prompt cannot tell the prompt from the completion with this model's slow "
                "tokenizer; give chats, `messages:`, or save a fast tokenizer with the model."
            )
        sequence = encoded.sequence_ids(0)
        return next((i for i, part in enumerate(sequence) if part == 1), len(sequence))

    def _chat(self, messages: Any) -> EncodedRow:
        """Render a chat; its prompt is everything before the last message."""
        if not self.tokenizer.chat_template:
            raise CalibrationError(
                "this model's tokenizer has no chat template; name a plain text column, `text:`."
            )
        whole = self._render(messages)
        is_fast = self.tokenizer.is_fast
        encoded = self.tokens(whole, add_special_tokens=False, return_offsets_mapping=is_fast)
        if not self.calibration.mask_prompt or len(messages) < 2:
            return self._reading(encoded)
        before = self._render(messages[:-1], add_generation_prompt=True)
        if not whole.startswith(before):
            raise CalibrationError(
                "the chat template does not render the prompt as a part of the whole chat, so it "
                "cannot be masked."
            )
        if is_fast:
            prompt = sum(stop <= len(before) for _, stop in encoded["offset_mapping"])
        else:
            prompt = len(self.tokenizer(before, add_special_tokens=False)["input_ids"])
        return self._reading(encoded, min(prompt, len(encoded["input_ids"])))

    def _render(self, messages: Any, **options: bool) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # a template is a program: roles that do not alternate, …
            raise CalibrationError(f"the chat template refuses this chat: {error}") from None
        return text


def encode(rows: Sequence[Row], encoder: Encoder, head: Head) -> list[Example]:
    """Make an example of every calibration row.

    Raises:
        CalibrationError: no room for any text, or a row that this head cannot read; it is named.
        CheckpointError: the tokenizer knows tokens that the model does not.
    """
    if encoder.tokenizer is not None:
        _check_room(encoder)
    examples = []
    for row in rows:
        try:
            examples.append(Example(row.number, *head.encode(row, encoder)))
        except FisherMergekitError as error:
            where = f"{encoder.calibration.path}, example {row.number}"
            raise type(error)(f"{where}: {error.message}") from error
    return examples


def _check_room(encoder: Encoder) -> None:
    """Refuse a length that special tokens fill: nothing, or all of the text, would be measured."""
    calibration = encoder.calibration
    if encoder.length < calibration.max_length and "max_length" in calibration.model_fields_set:
        LOG.warning(
            "max_length: %d tokens are more than this model or its tokenizer takes; examples are "
            "cut to %d.",
            calibration.max_length,
            encoder.length,
        )
    if calibration.messages is not None:
        return  # a chat template adds its own
    pair = isinstance(calibration.text, tuple) or calibration.choices is not None
    special = encoder.tokenizer.num_special_tokens_to_add(pair=pair)
    if special and encoder.length <= special:
        raise CalibrationError(
            f"max_length: {encoder.length} tokens an example leave no room for text, because the "
            f"tokenizer adds {special} special ones. Raise it; the default is "
            f"{Calibration.model_fields['max_length'].default}."
        )


def longest_input(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> int:
    """Return how many tokens the model has positions for, and its tokenizer says it takes."""
    positions = getattr(config, "max_position_embeddings", None) or 1 << 30
    if "roberta" in config.model_type and config.pad_token_id is not None:
        positions -= config.pad_token_id + 1  # RoBERTa counts positions from there
    return min(int(tokenizer.model_max_length), positions)


def reads(architecture: str) -> str:
    """Return the main input of a transformers class: `input_ids`, `pixel_values`, ….

    What a class of remote code reads is not known before its code is run; most read text.
    """
    model_class = getattr(transformers, architecture, None)
    return str(getattr(model_class, "main_input_name", "input_ids"))


def fingerprint(examples: Sequence[Example]) -> str:
    """Return a digest of what the model saw: inputs, what is scored and observed, in order."""
    hasher = xxhash.xxh3_128()
    for example in examples:
        seen = {**example.inputs, "scored": example.scored, "outcome": example.outcome}
        for name, x in seen.items():
            if x is not None:
                hasher.update(f"{name} {x.dtype} {list(x.shape)}".encode())
                hasher.update(x.contiguous().numpy().tobytes())
    return hasher.hexdigest()
