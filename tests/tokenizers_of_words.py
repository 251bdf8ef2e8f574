"""A tokenizer of a few words, made on the spot, for tiny models that are measured on text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from models import VOCABULARY
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = (
    *("the", "a", "cat", "dog", "mat", "house", "on", "under", "and", "not"),
    *("is", "was", "sat", "ran", "good", "bad", ".", ":", "user", "assistant"),
)
assert len(SPECIAL) + len(WORDS) == VOCABULARY

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : {{ message['content'] }} . {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def give_tokenizer(
    folder: Path,
    *,
    chat: bool = False,
    pairs: bool = True,
    tokens: Sequence[str] = (*SPECIAL, *WORDS),
) -> None:
    """Save a tokenizer into a model's folder; it numbers the tokens as they come."""
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    if pairs:
        tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=16,
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
