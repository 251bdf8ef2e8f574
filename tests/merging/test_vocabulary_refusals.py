"""Vocabularies that cannot be brought in line: one clear sentence each, at planning."""

import json

import pytest
import transformers
from models import make_measured
from running import merged, recipe_of
from tokenizers_of_words import give_tokenizer
from vocabulary_oracle import make_described_speaker, make_speakers

from fisher_mergekit.errors import PlanningError


@pytest.fixture
def pair(tmp_path):
    return make_speakers(tmp_path, ("cat dog the", "dog the mat cow"))


def problems(content, out, **options):
    """Return what planning says; it says it before anything is written."""
    with pytest.raises(PlanningError) as info:
        merged(content, out, **options)
    assert not out.exists()
    return info.value.problems


def problem(content, out, **options):
    """Return what planning says, which is one thing."""
    (message,) = problems(content, out, **options)
    return message


def recipe(pair, **top):
    return recipe_of(*(s.folder for s in pair), **{"base_model": str(pair[0].folder), **top})


def test_of_different_size_without_a_word_about_it(pair, tmp_path):
    message = problem(recipe(pair), tmp_path / "out")
    assert message.startswith(
        "the models' vocabularies differ: model.embed_tokens.weight is [7, 8]"
    )
    assert "write at the top `tokenizer_source: union` (or `base`, which drops" in message


@pytest.mark.parametrize("key", ["tokenizer_source", "tokenizer"])
def test_the_base_of_a_recipe_that_names_none(pair, tmp_path, key):
    value = "base" if key == "tokenizer_source" else {"source": "base"}
    message = problem(recipe(pair, base_model=None, **{key: value}), tmp_path / "out")
    assert "is to be base_model's, and the recipe names none. Add `base_model:`" in message


def test_a_model_without_a_tokenizer(pair, tmp_path):
    """mergekit would take it to have base_model's; transformers makes some up."""
    for which in pair:
        for path in which.folder.glob("token*"):
            path.rename(path.with_name("kept-" + path.name[:3]))
        message = problem(recipe(pair, tokenizer_source="union"), tmp_path / "out")
        assert message.startswith(f"{which.folder} has no tokenizer that transformers can load")
        give_tokenizer(which.folder, pairs=False, tokens=which.tokens)
    (pair[1].folder / "tokenizer.json").write_text("{}")
    (message,) = problems(recipe(pair, tokenizer_source="union"), tmp_path / "out")
    assert message.startswith(f"{pair[1].folder} has no tokenizer that transformers can load")


def test_a_tokenizer_of_another_model(pair, tmp_path):
    (tmp_path / "empty").mkdir()
    source = str(tmp_path / "empty")
    message = problem(recipe(pair, tokenizer_source=source), tmp_path / "out")
    assert message.startswith(f"{source} has no tokenizer")


@pytest.mark.parametrize(("typed", "meant"), [("unoin", "union"), ("Base", "base")])
def test_a_misspelt_word_is_not_asked_of_the_hub(pair, tmp_path, monkeypatch, typed, meant):
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", None)
    message = problem(recipe(pair, tokenizer_source=typed), tmp_path / "out")
    assert message == (
        f"tokenizer_source: {typed} is taken for a model, and there is none here. Did you mean "
        f"{meant!r}?"
    )


@pytest.mark.parametrize(
    ("token", "config", "told"),
    [
        ("new", {}, "there is no `source:` of the row for models that lack it"),
        ("the", {"force": True}, "there is no `source:` of the row to force on all models"),
        ("cow", {"source": "{a}"}, "its source {a} has no token 'cow'"),
        ("new", {"source": "./elsewhere"}, "its source ./elsewhere is none of the models of "),
        ("new", {"source": {"token": "catt"}}, "has no token 'catt'. Did you mean 'cat'?"),
        ("new", {"source": {"token_id": 7}}, "7 is no token of its source {a}, which has 7 rows"),
        ("new", {"source": {"token_id": -1}}, "-1 is no token of its source {a}"),
    ],
)
def test_sources_of_tokens_that_are_not_there(pair, tmp_path, token, config, told):
    folder = str(pair[0].folder)
    source = config.get("source")
    if isinstance(source, dict):
        config = {"source": {"kind": "model_token", "model": folder, **source}}
    elif source:
        config = {"source": source.format(a=folder)}
    tokenizer = {"source": "union", "tokens": {token: config}}
    for message in problems(recipe(pair, tokenizer=tokenizer), tmp_path / "out"):
        assert message.startswith(f"tokenizer: tokens: {token!r}: ")
        assert told.format(a=folder) in message


def test_a_source_that_is_asked_for_nothing_is_not_missed(pair, tmp_path):
    """As in mergekit: every model has the token, and nothing is forced."""
    tokenizer = {"source": "union", "tokens": {"the": {"source": "./elsewhere"}}}
    merged(recipe(pair, tokenizer=tokenizer), tmp_path / "out")


def test_padding_to_nothing(pair, tmp_path):
    tokenizer = {"pad_to_multiple_of": -8}
    message = problem(recipe(pair, tokenizer=tokenizer), tmp_path / "out")
    assert message == "tokenizer: pad_to_multiple_of is -8; it must be 1 or more."


def test_fewer_rows_than_the_tokenizer_and_the_configuration_say(pair, tmp_path):
    config = json.loads((pair[1].folder / "config.json").read_text())
    (pair[1].folder / "config.json").write_text(json.dumps({**config, "vocab_size": 20}))
    give_tokenizer(pair[1].folder, pairs=False, tokens=(*pair[1].tokens, "more"))
    messages = problems(recipe(pair, tokenizer_source="union"), tmp_path / "out")
    assert "numbers tokens up to 8, but model.embed_tokens.weight has 8 rows" in messages[0]


def test_other_sizes_still_differ(pair, tmp_path):
    other = make_measured(tmp_path / "c", "llama", hidden_size=12, vocab_size=9)[0]
    give_tokenizer(other)
    content = recipe_of(pair[0].folder, other, tokenizer_source="union")
    messages = problems({**content, "base_model": str(other)}, tmp_path / "out")
    assert any("tensors differ in shape: model.embed_tokens.weight" in m for m in messages)


class TestTruncation:
    def test_base_model_keeps_its_configuration(self, pair, tmp_path):
        content = recipe(pair, base_model=str(pair[1].folder))
        message = problem(content, tmp_path / "out", unsafe_truncate_embeddings=True)
        assert "model.embed_tokens.weight is [8, 8]; merged it is [7, 8]" in message

    def test_no_base_model(self, pair, tmp_path):
        content = recipe(pair, base_model=None)
        message = problem(content, tmp_path / "out", unsafe_truncate_embeddings=True)
        assert message.startswith("--unsafe-truncate-embeddings cuts model.embed_tokens.weight: ")
        assert message.endswith("as `base_model:` the model with the smallest vocabulary.")


def test_factors_of_other_forms(tmp_path):
    """Of a vocabulary beyond some size the head's output factor is a diagonal."""
    made = [
        make_described_speaker(tmp_path / n, w, "kfac", seed=i)
        for i, (n, w) in enumerate((("a", "cat dog the"), ("b", "dog the mat cow")))
    ]
    described = made[1][1]
    stored = described.factors["lm_head.weight"].outputs
    described.stored[stored] = described.stored[stored].diagonal().clone()
    described.write()
    content = recipe([m[0] for m in made], method="mats", tokenizer_source="union")
    message = problem(content, tmp_path / "out")
    assert "the kfac of lm_head.weight is inputs [8, 8], outputs ['tokens', 'tokens']" in message
    assert "but inputs [8, 8], outputs ['tokens']" in message
