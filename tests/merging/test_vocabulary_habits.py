"""Aligned vocabularies with slices, flags, models of pictures; and what is done once."""

from dataclasses import replace

import pytest
import torch
import transformers
import yaml
from mergekit.tokenizer import build
from models import FAMILIES, make_measured
from running import assert_close, merged
from tokenizers_of_words import give_tokenizer
from vocabulary_oracle import (
    EMBEDDING,
    HEAD,
    TABLES,
    Speaker,
    expected,
    fisher_rows,
    loads,
    make_speakers,
    recipe,
    rows,
    tokens_of,
)

from fisher_mergekit.errors import PlanningError
from fisher_mergekit.merging import vocabulary
from fisher_mergekit.recipe import read_recipe

pytestmark = pytest.mark.slow  # exhaustive: not needed at every change


@pytest.fixture
def speakers(tmp_path):
    return make_speakers(tmp_path)


def test_slices_take_the_tokens_of_their_models(speakers, tmp_path):
    """As in mergekit: the embedding is the first slice's, the head the last's."""
    a, b, _ = speakers

    def piece(layer, *sources):
        return {
            "sources": [
                {"model": str(s.folder), "layer_range": [layer, layer + 1]} for s in sources
            ]
        }

    content = {
        "merge_method": "fisher",
        "dtype": "float32",
        "tokenizer_source": "union",
        "base_model": str(a.folder),
        "slices": [piece(0, a, b), piece(1, b)],
    }
    found = merged(content, tmp_path / "out")
    tokens = tokens_of(tmp_path / "out")
    # A model's scale is that of what is merged of it: second layers, norms and heads are not.
    merged_of = [
        replace(s, fishers={n: f for n, f in s.fishers.items() if n == EMBEDDING or ".0." in n})
        for s in (a, b)
    ]
    tables, own = rows(merged_of, EMBEDDING, tokens, a)
    embedding = fisher_rows(tables, own, merged_of, EMBEDDING, tokens, [1, 1])
    assert_close({EMBEDDING: found[EMBEDDING]}, {EMBEDDING: embedding})
    for place, token in enumerate(tokens):
        if token not in b.tokens:
            assert torch.equal(found[EMBEDDING][place].double(), a.row(EMBEDDING, token))
            assert not found[HEAD][place].any()
        else:
            assert torch.equal(found[HEAD][place].double(), b.row(HEAD, token))
    loads(tmp_path / "out", len(tokens))


@pytest.mark.parametrize("source", ["base", "union"])
def test_an_added_token_has_no_row_in_the_padding_of_base_model(speakers, tmp_path, source):
    """Though it gets that row's number: nobody has trained it, and the recipe names its source."""
    a, b, _ = speakers
    folder, thetas, fishers = make_measured(tmp_path / "d", "llama", seed=7, vocab_size=12)
    give_tokenizer(folder, pairs=False, tokens=a.tokens)
    padded = Speaker(folder, a.tokens, thetas, fishers)
    of_beta = {"kind": "model_token", "model": str(b.folder), "token": "beta"}
    tokenizer = {"source": source, "tokens": {"new": {"source": of_beta}}}
    content = recipe([padded, b], [1, 2], tokenizer=tokenizer, base_model=str(folder))
    found = merged(content, tmp_path / "out")
    tokens = tokens_of(tmp_path / "out")
    for name in TABLES:
        assert torch.equal(found[name][tokens.index("new")].double(), b.row(name, "beta"))
        given = {"new": b.row(name, "beta")}
        tables, own = rows([padded, b], name, tokens, padded, given=given)
        assert_close(
            {name: found[name]},
            {name: fisher_rows(tables, own, [padded, b], name, tokens, [1, 2])},
        )
    tokenizer["tokens"]["new"] = {"source": str(folder)}
    with pytest.raises(PlanningError, match="has no token 'new'"):
        merged(content, tmp_path / "refused")


def test_half_precision_and_other_flags(speakers, tmp_path):
    lambdas = [3, 2, 1]
    content = recipe(speakers, lambdas, tokenizer_source="union", dtype="bfloat16")
    content["base_model"] = str(speakers[0].folder)
    options = {"async_write": True, "low_cpu_memory": True, "lazy_unpickle": True}
    found = merged(content, tmp_path / "out", clone_tensors=True, **options)
    tokens = tokens_of(tmp_path / "out")
    whole = expected(speakers, tokens, lambdas, base=speakers[0])
    assert_close(found, {n: t.bfloat16() for n, t in whole.items()}, rtol=1e-2, atol=1e-3)


def test_precompute_reads_such_a_recipe(speakers, tmp_path):
    path = tmp_path / "recipe.yml"
    tokenizer = {"source": "union", "tokens": {"cat": {"source": str(speakers[0].folder)}}}
    path.write_text(yaml.safe_dump(recipe(speakers, tokenizer=tokenizer)))
    assert [str(m.reference) for m in read_recipe(path).models] == [str(s.folder) for s in speakers]


def test_the_tokenizer_is_built_once_in_planning(speakers, tmp_path, monkeypatch):
    calls = []
    original = build.build_tokenizer
    monkeypatch.setattr(
        build, "build_tokenizer", lambda **how: calls.append(how) or original(**how)
    )
    content = recipe(speakers, tokenizer_source="union", base_model=str(speakers[0].folder))
    merged(content, tmp_path / "1")
    assert len(calls) == 1
    # A model's tokenizer may have changed by the next merge of one process.
    give_tokenizer(speakers[1].folder, pairs=False, tokens=(*speakers[1].tokens[:-1], "moon"))
    merged(content, tmp_path / "2")
    assert set(tokens_of(tmp_path / "2")) - set(tokens_of(tmp_path / "1")) == {"moon"}


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_model_of_pictures_and_text(tmp_path, family, monkeypatch):
    """mergekit writes the size of the vocabulary where this kind's configuration has none."""
    words = (" ".join(f"w{i}" for i in range(first, first + 26)) for first in (0, 3))
    sizes = FAMILIES[family][1]["text_config"]
    text = {**sizes, "vocab_size": 30}
    made = make_speakers(tmp_path, words, family, text_config=text)
    content = recipe(made, [1, 2], tokenizer_source="union", base_model=str(made[0].folder))
    found = merged(content, tmp_path / "out")
    tokens = tokens_of(tmp_path / "out")
    assert len(tokens) == 33
    tables = [n for n, t in made[0].thetas.items() if t.shape[0] == 30]
    assert len(tables) == 2
    for name in tables:
        expected_rows = fisher_rows(*rows(made, name, tokens, made[0]), made, name, tokens, [1, 2])
        (ours,) = (t for n, t in found.items() if name.endswith(n.rpartition("model.")[2]))
        assert_close({name: ours}, {name: expected_rows})
    architecture = getattr(transformers, FAMILIES[family][0])
    _, info = architecture.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())

    monkeypatch.setattr(vocabulary, "settle", lambda planner, _: planner.out_model_config)
    with pytest.raises(PlanningError, match="mergekit does not know where this kind of model has"):
        merged(content, tmp_path / "again")
