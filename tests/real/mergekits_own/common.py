"""Stands in for the helpers of mergekit's own tests, which its source package does not ship.

It is put beside them as `tests/common.py`, under the names that they import from there; what the
helpers do is told by how they are used. Random numbers are the same in each run, and a digest of
every merged model is noted, so that two runs can be compared byte by byte.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

_seeds = itertools.count(1)

_DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
}


def make_picollama(path: object, vocab_size: int = 64) -> str:
    config = transformers.LlamaConfig(vocab_size=vocab_size, **_DECODER)
    return _save(transformers.LlamaForCausalLM, config, path)


def make_picogranite(path: object, vocab_size: int = 64) -> str:
    config = transformers.GraniteConfig(vocab_size=vocab_size, **_DECODER)
    return _save(transformers.GraniteForCausalLM, config, path)


def make_gpt2size(path: object, vocab_size: int = 64) -> str:
    """As deep as GPT-2, whose layers the tests count, but as narrow as the others."""
    config = transformers.GPT2Config(vocab_size=vocab_size, n_embd=32, n_head=4, n_layer=12)
    return _save(transformers.GPT2LMHeadModel, config, path)


def make_picoLlaVa(path: object) -> str:
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", "vocab_size": 64, **_DECODER},
        vision_config={
            "model_type": "clip_vision_model", **_DECODER, "image_size": 8, "patch_size": 4,
        },
        image_token_index=63,
    )  # fmt: skip
    return _save(transformers.LlavaForConditionalGeneration, config, path)


def run_and_check_merge(
    config: MergeConfiguration,
    *,
    validate: Callable[[str], None] | None = None,
    auto_arch: bool = False,
) -> None:
    """Merge, look whether transformers can load what came of it, and note its digest."""
    with tempfile.TemporaryDirectory() as folder:
        run_merge(config, folder, MergeOptions(random_seed=0, quiet=True))
        merged_config = transformers.AutoConfig.from_pretrained(folder)
        architecture = getattr(transformers, merged_config.architectures[0])
        _, info = architecture.from_pretrained(folder, output_loading_info=True)
        # Of models that mergekit has no list of it guesses the tensors' names, and misses some.
        assert auto_arch or not info["missing_keys"], info["missing_keys"]
        if validate is not None:
            validate(folder)
        _note(Path(folder))


def _save(model_class: type, config: object, path: object) -> str:
    torch.manual_seed(next(_seeds))
    model_class(config).save_pretrained(path)
    return str(path)


def _note(folder: Path) -> None:
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.name.encode() + file.read_bytes())
    test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]
    with open(os.environ["FISHER_MERGEKIT_TEST_DIGESTS"], "a", encoding="utf-8") as notes:
        notes.write(f"{test} {digest.hexdigest()}\n")
