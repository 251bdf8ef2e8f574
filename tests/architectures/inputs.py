"""Calibration data for the tiny models.

What the command can read goes through it: texts from a file, by a tokenizer made on the spot. What
it cannot read yet (pictures beside a text, sounds) is made here, one example at a time, as the
model is called with it.

Texts are of different lengths, so that batches are padded, and so are Qwen's pictures.
"""

from __future__ import annotations

import json
from pathlib import Path

import tiny
import torch
import transformers
from architectures.zoo import BOS, IMAGE, VISION_END, VISION_START, WORDS
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from fisher_mergekit.measure.batches import Example

LENGTHS = (9, 3, 6, 5, 8)
"""Words of each example that is made here."""

GRIDS = ((1, 2, 2), (1, 2, 4), (1, 4, 4), (1, 4, 2), (1, 2, 2))
"""Patches of each picture that Qwen sees, as (time, height, width); four make one token."""

_SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def example(architecture: str, number: int) -> Example | None:
    """Return an example that the command cannot read yet; None if it can."""
    generator = torch.Generator().manual_seed(7000 + number)
    words = torch.randint(len(_SPECIAL), WORDS, (1, LENGTHS[number]), generator=generator)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if architecture == "WhisperForConditionalGeneration":
        begun = torch.cat([torch.full((1, 1), BOS), words[:, :-1]], 1)
        inputs = {"input_features": noise(1, 4, 12), "decoder_input_ids": begun}
        return Example(number, inputs, torch.ones_like(words[0], dtype=torch.bool), words[0])
    if architecture.endswith("ForImageClassification"):
        return Example(number, {"pixel_values": noise(1, 3, 8, 8)})
    if not architecture.endswith("ForConditionalGeneration") or architecture.startswith("T5"):
        return None

    pixels = {"pixel_values": noise(1, 3, 8, 8)}
    tokens = 4
    if architecture.startswith("Qwen"):
        time, height, width = GRIDS[number]
        tokens = height * width // 4
        pixels = {
            "pixel_values": noise(time * height * width, 3 * 2 * 4 * 4),
            "image_grid_thw": torch.tensor([GRIDS[number]]),
        }
    elif architecture == "Mistral3ForConditionalGeneration":
        pixels["image_sizes"] = torch.tensor([[8, 8]])
    elif architecture == "Llama4ForConditionalGeneration":
        tokens = 1
    picture = torch.tensor([[VISION_START, *[IMAGE] * tokens, VISION_END]])
    ids = torch.cat([words[:, :1], picture, words[:, 1:]], 1)
    if architecture.startswith("Qwen"):
        pixels["mm_token_type_ids"] = (ids == IMAGE).long()
    following = torch.cat([ids[0, 1:], torch.zeros(1, dtype=torch.long)])
    # The picture is given, not predicted; the last position predicts nothing.
    return Example(
        number, {"input_ids": ids, **pixels}, (following < WORDS) & (following > 0), following
    )


def write_data(architecture: str, folder: Path) -> dict[str, str]:
    """Write texts for a model, and return the flags that name them."""
    path = folder / "data.jsonl"
    rows = [
        {"text": row["text"], "pair": row["pair"], "more": after["pair"]}
        for row, after in zip(tiny.ROWS, tiny.ROWS[1:], strict=False)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    columns = {"text": "text"}
    if architecture == "T5ForConditionalGeneration":
        columns = {"text": ["text", "pair"]}
    elif architecture.endswith("ForMultipleChoice"):
        columns = {"text": "text", "choices": ["pair", "more"]}
    return {"path": str(path), **columns}


def save_tokenizer(architecture: str, folder: Path) -> None:
    """Save a tokenizer of `WORDS` words with a model."""
    model_type = getattr(transformers, architecture).config_class.model_type
    if model_type == "qwen2":  # it is read as its own byte-level tokenizer, whatever is saved
        letters = {letter: number for number, letter in enumerate("abcdefghijklmnopqrstuvw")}
        transformers.Qwen2Tokenizer(vocab=letters, merges=[]).save_pretrained(folder)
        return
    vocabulary = {word: index for index, word in enumerate((*_SPECIAL.values(), *tiny.WORDS))}
    assert len(vocabulary) == WORDS
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    if not architecture.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(word, vocabulary[word]) for word in ("[CLS]", "[SEP]")],
        )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **_SPECIAL,
        model_max_length=20,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)
