"""What a merge of ours writes beside the tensors: all that mergekit's own `linear` does."""

from __future__ import annotations

import json

import pytest
from models import make_measured
from running import merged
from tokenizers_of_words import give_tokenizer
from vocabulary_oracle import WORDS, make_speakers, recipe

pytestmark = pytest.mark.slow  # exhaustive: not needed at every change

METHOD_S_OWN = {"README.md", "mergekit_config.yml"}
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def beside(out):
    """Return the content of all files but the tensors, and those that name the method."""
    found = {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.suffix != ".safetensors" and path.name not in METHOD_S_OWN
    }
    if "tokenizer.json" in found:
        # mergekit numbers the tokens that it adds in the order of a set, from merge to merge anew.
        content = json.loads(found["tokenizer.json"])
        tokens = {token["content"]: {**token, "id": 0} for token in content["added_tokens"]}
        found["tokenizer.json"] = {**content, "added_tokens": tokens}
    return found


@pytest.fixture
def speakers(tmp_path):
    """Return three models, each with a tokenizer of its own and settings for generating."""
    made = make_speakers(tmp_path, WORDS)
    for number, speaker in enumerate(made):
        path = speaker.folder / "generation_config.json"
        path.write_text(json.dumps({"temperature": 0.5 + number / 10, "do_sample": True}))
    return made


@pytest.mark.parametrize(
    "top",
    [
        {"tokenizer_source": "union"},
        {"tokenizer_source": "base"},
        {"tokenizer_source": "union", "chat_template": "chatml"},
        {"tokenizer_source": "union", "chat_template": "auto"},
        {"tokenizer_source": "union", "chat_template": TEMPLATE},
        {"tokenizer_source": "union", "out_dtype": "bfloat16"},
        {"tokenizer": {"source": "union", "pad_to_multiple_of": 16}},
    ],
    ids=str,
)
def test_with_vocabularies(speakers, tmp_path, top):
    found = {}
    for method in ("linear", "fisher"):
        content = recipe(speakers, method=method, base_model=str(speakers[0].folder), **top)
        if method == "linear":
            content["parameters"] = {"weight": 1}
        merged(content, tmp_path / method, copy_tokenizer=True)
        found[method] = beside(tmp_path / method)
    assert found["fisher"] == found["linear"]
    assert {"config.json", "tokenizer.json"} <= found["fisher"].keys()
    # `auto` takes what most models have, and these have none.
    assert (top.get("chat_template", "auto") != "auto") == any(
        name == "chat_template.jinja" or "chat_template" in str(content)
        for name, content in found["fisher"].items()
    )


@pytest.mark.parametrize("flags", [{}, {"copy_tokenizer": True}, {"out_shard_size": 2000}], ids=str)
def test_without(tmp_path, flags):
    folders = [make_measured(tmp_path / n, "llama", seed=i)[0] for i, n in enumerate("ab")]
    for folder in folders:
        give_tokenizer(folder, pairs=False)
    found = {}
    for method in ("linear", "fisher"):
        models = [{"model": str(f), "parameters": {"weight": 1}} for f in folders]
        content = {"merge_method": method, "models": models, "dtype": "float32"}
        merged(content, tmp_path / method, **flags)
        found[method] = beside(tmp_path / method)
    assert found["fisher"] == found["linear"]
    assert ("tokenizer.json" in found["fisher"]) == ("copy_tokenizer" in flags)
