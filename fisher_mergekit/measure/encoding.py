"""Rows to tokenised examples, by the model's own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import xxhash
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from fisher_mergekit.errors import CalibrationError, CheckpointError
from fisher_mergekit.measure.batches import Example
from fisher_mergekit.measure.calibration import Row
from fisher_mergekit.measure.likelihoods.base import Likelihood
from fisher_mergekit.recipe import Calibration

_INPUTS = ("input_ids", "token_type_ids")


def encode(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    calibration: Calibration,
    likelihood: Likelihood,
) -> list[Example]:
    """Tokenise calibration rows, cut to the maximum length.

    Raises:
        CalibrationError: an empty example, a label outside the model's classes, a chat without a
            chat template, a prompt that cannot be told from the rest, or no room for any text.
        CheckpointError: the tokenizer knows tokens that the model does not.
    """
    length = min(calibration.max_length, longest_input(tokenizer, config))
    _check_room(tokenizer, calibration, length)
    vocabulary = getattr(config, "vocab_size", None) or 1 << 62
    examples = []
    for number, row in enumerate(rows):
        where = f"{calibration.path}, example {number}"
        ids, prompt = _ids(row, tokenizer, calibration, length, where)
        if getattr(config, "type_vocab_size", None) in (None, 0, 1):
            # A generic tokenizer makes them for any model, and GPT-2 would read them as words.
            ids.pop("token_type_ids", None)
        if not ids["input_ids"]:
            raise CalibrationError(f"{where}: the text has no tokens.")
        if max(ids["input_ids"]) >= vocabulary:
            raise CheckpointError(
                f"{where}: the tokenizer gives token {max(ids['input_ids'])}, but the model has "
                f"only {vocabulary} (vocab_size). They do not belong together; put the model's own "
                "tokenizer files into its folder."
            )
        label = None if row.label is None else _class_index(row.label, config, where)
        inputs = {name: torch.tensor([x]) for name, x in ids.items()}
        examples.append(Example(number, inputs, *likelihood.target(inputs, prompt, label)))
    return examples


def _check_room(tokenizer: PreTrainedTokenizerBase, calibration: Calibration, length: int) -> None:
    """Refuse a length that special tokens fill: nothing, or all of the text, would be measured."""
    if calibration.messages is not None:
        return  # a chat template adds its own
    special = tokenizer.num_special_tokens_to_add(pair=isinstance(calibration.text, tuple))
    if special and length <= special:
        raise CalibrationError(
            f"max_length: {length} tokens an example leave no room for text, because the tokenizer "
            f"adds {special} special ones. Raise it; the default is "
            f"{Calibration.model_fields['max_length'].default}."
        )


def longest_input(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> int:
    """Return how many tokens the model has positions for."""
    positions = getattr(config, "max_position_embeddings", None) or 1 << 30
    if "roberta" in config.model_type and config.pad_token_id is not None:
        positions -= config.pad_token_id + 1  # RoBERTa counts positions from there
    return min(int(tokenizer.model_max_length), positions)


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


def _ids(
    row: Row, tokenizer: Any, calibration: Calibration, length: int, where: str
) -> tuple[dict[str, list[int]], int]:
    """Return model inputs, and the length of the prompt in tokens."""
    if row.messages is not None:
        return _chat_ids(row.messages, tokenizer, calibration.mask_prompt, length, where)
    first, second = row.text if isinstance(row.text, tuple) else (row.text, None)
    encoded = tokenizer(first, second, truncation=True, max_length=length)
    inputs = {name: list(encoded[name]) for name in _INPUTS if name in encoded}
    if not calibration.mask_prompt:
        return inputs, 0
    if second is None:
        raise CalibrationError(
            "mask_prompt needs to know the prompt: give a pair `text: [PROMPT, COMPLETION]`, or "
            "`messages:`."
        )
    if not tokenizer.is_fast:
        raise CalibrationError(
            "mask_prompt cannot tell the prompt from the completion with this model's slow "
            "tokenizer; give chats, `messages:`, or save a fast tokenizer with the model."
        )
    sequence = encoded.sequence_ids(0)
    prompt = next((i for i, part in enumerate(sequence) if part == 1), len(sequence))
    return inputs, prompt


def _chat_ids(
    messages: Any, tokenizer: Any, mask_prompt: bool, length: int, where: str
) -> tuple[dict[str, list[int]], int]:
    """Render a chat; its prompt is everything before the last message."""
    if not tokenizer.chat_template:
        raise CalibrationError(
            "this model's tokenizer has no chat template; name a plain text column, `text:`."
        )
    whole = _render(messages, tokenizer, where)
    encoded = tokenizer(
        whole,
        add_special_tokens=False,
        truncation=True,
        max_length=length,
        return_offsets_mapping=tokenizer.is_fast,
    )
    inputs = {name: list(encoded[name]) for name in _INPUTS if name in encoded}
    if not mask_prompt or len(messages) < 2:
        return inputs, 0
    before = _render(messages[:-1], tokenizer, where, add_generation_prompt=True)
    if not whole.startswith(before):
        raise CalibrationError(
            f"{where}: the chat template does not render the prompt as a part of the whole chat, "
            "so it cannot be masked."
        )
    if tokenizer.is_fast:
        return inputs, sum(stop <= len(before) for _, stop in encoded["offset_mapping"])
    prompt = len(tokenizer(before, add_special_tokens=False)["input_ids"])
    return inputs, min(prompt, len(inputs["input_ids"]))


def _render(messages: Any, tokenizer: Any, where: str, **options: bool) -> str:
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template is a program: roles that do not alternate, …
        raise CalibrationError(f"{where}: the chat template refuses this chat: {error}") from None
    return text


def _class_index(label: int | float | str, config: PretrainedConfig, where: str) -> int:
    """Return the class index of a label given as an index or a name.

    An index may also be `1.0` or `"1"`: a CSV with one empty cell reads its whole column so.
    """
    classes = config.num_labels
    if isinstance(label, str) and label in config.label2id:
        return int(config.label2id[label])
    index = _whole(label)
    if index is not None and 0 <= index < classes:
        named = config.label2id.get(str(index), index)
        if named != index:
            raise CalibrationError(
                f"{where}: label {label!r} is the name of the model's class {named}, but also the "
                f"index of another, {config.id2label[index]!r}. Give names as text, or, as only "
                "the empirical estimator needs labels, drop `label:`."
            )
        return index
    names = ", ".join(str(config.id2label[i]) for i in range(min(classes, 8)))
    raise CalibrationError(
        f"{where}: label {label!r} is none of the model's {classes} classes (0 to {classes - 1}: "
        f"{names}). Give data of the model's own task; only the empirical estimator needs labels, "
        "for the others drop `label:`."
    )


def _whole(label: object) -> int | None:
    """Return a label as a whole number, if it is one."""
    if isinstance(label, str):
        return int(label) if label.isdecimal() else None
    if isinstance(label, bool) or not isinstance(label, (int, float)) or label != label // 1:
        return None
    return int(label)
