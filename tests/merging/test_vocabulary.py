"""Models of different vocabularies: every row of tokens by hand, through mergekit's own command."""

import merge_oracle
import pytest
import torch
import transformers
from models import FAMILIES, random_fishers, read, rewrite, write_fishers
from running import assert_close, merged, mergekit_yaml
from tokenizers_of_words import SPECIAL, give_tokenizer
from vocabulary_oracle import (
    EMBEDDING,
    HEAD,
    TABLES,
    Speaker,
    expected,
    filled,
    fisher_rows,
    loads,
    make_speakers,
    recipe,
    rows,
    tokens_of,
)


@pytest.fixture
def speakers(tmp_path):
    return make_speakers(tmp_path)


@pytest.mark.slow
def test_a_union_by_the_command(speakers, tmp_path):
    lambdas = [0.5, 0.3, 0.2]
    content = recipe(
        speakers, lambdas, tokenizer_source="union", base_model=str(speakers[0].folder)
    )
    process, out = mergekit_yaml(content, tmp_path)
    assert process.returncode == 0, process.stderr
    tokens = tokens_of(out)
    assert set(tokens) == {*SPECIAL, "cat", "dog", "the", "mat", "alpha", "beta", "gamma"}
    found = read(out)
    assert_close(found, expected(speakers, tokens, lambdas, base=speakers[0]))
    for speaker, token in zip(speakers, ("alpha", "beta", "gamma"), strict=True):
        for name in TABLES:  # to the last bit
            assert torch.equal(found[name][tokens.index(token)].double(), speaker.row(name, token))
    loads(out, len(tokens))


@pytest.mark.parametrize("source", ["base", "b", "c"])
def test_the_vocabulary_of_one_model(speakers, tmp_path, source):
    """Whose tokens the others lack keep its rows, and theirs that it lacks are dropped."""
    of = {"base": speakers[0], "b": speakers[1], "c": speakers[2]}[source]
    given = source if source == "base" else str(of.folder)
    content = recipe(speakers, [1, 2, 3], base_model=str(speakers[0].folder))
    found = merged({**content, "tokenizer": {"source": given}}, tmp_path / "out")
    assert tokens_of(tmp_path / "out") == list(of.tokens)
    assert_close(found, expected(speakers, of.tokens, [1, 2, 3], base=speakers[0]))
    loads(tmp_path / "out", len(of.tokens))


def test_without_base_model(speakers, tmp_path, caplog):
    """What two of three have is filled in as their mean, which counts by the floor alone."""
    found = merged(recipe(speakers, tokenizer_source="union"), tmp_path / "out")
    tokens = tokens_of(tmp_path / "out")
    assert_close(found, expected(speakers, tokens, [1, 1, 1]))
    assert "names no base_model" in caplog.text
    row = found[HEAD][tokens.index("dog")]
    alone = merge_oracle.merge_tensor(
        [s.row(HEAD, "dog") for s in speakers[:2]],
        [s.row(HEAD, "dog", "fishers") for s in speakers[:2]],
        [1, 1],
        [merge_oracle.scale(s.fishers, s.fishers) for s in speakers[:2]],
    )
    torch.testing.assert_close(row.double(), alone, rtol=1e-3, atol=1e-3)


def test_an_unlisted_base_gives_tokens_and_nothing_else(speakers, tmp_path):
    a, b, base = speakers
    content = recipe([a, b], [3, 1], tokenizer_source="union", base_model=str(base.folder))
    found = merged(content, tmp_path / "out")
    tokens = tokens_of(tmp_path / "out")
    assert_close(found, expected([a, b, base], tokens, [3, 1, 0], base=base))
    place = tokens.index("gamma")
    assert torch.equal(found[HEAD][place].double(), base.row(HEAD, "gamma"))


def test_a_model_of_lambda_0_gives_tokens_and_nothing_else(speakers, tmp_path):
    content = recipe(speakers, [1, 0, 2], tokenizer_source="union")
    found = merged({**content, "base_model": str(speakers[2].folder)}, tmp_path / "out")
    tokens = tokens_of(tmp_path / "out")
    assert_close(found, expected(speakers, tokens, [1, 0, 2], base=speakers[2]))
    place = tokens.index("beta")
    assert torch.equal(found[HEAD][place].double(), speakers[1].row(HEAD, "beta"))


def test_sources_of_single_tokens(speakers, tmp_path):
    """Each way to name a source, for tokens that some lack, that nobody has, and forced."""
    a, b, c = speakers

    def of(speaker, **more):
        return {"kind": "model_token", "model": str(speaker.folder), **more}

    configs = {
        "alpha": {"source": of(b, token="beta")},  # a has it and keeps its own
        "dog": {"source": {"kind": "zero"}},  # c lacks it
        "new": {"source": of(c, token="gamma")},
        "newer": {"source": of(a, token_id=5)},
        "mat": {"source": str(c.folder), "force": True},
        "cat": {"source": {"kind": "zero"}, "force": True},
        "the": {"source": of(b, token="beta"), "force": True},
    }
    tokenizer = {"source": "union", "tokens": configs, "pad_to_multiple_of": 8}
    content = recipe(speakers, [1, 2, 3], tokenizer=tokenizer, base_model=str(a.folder))
    found = merged(content, tmp_path / "out")
    tokens = tokens_of(tmp_path / "out")
    assert len(tokens) == 13
    assert found[HEAD].shape == (16, 8)
    for name in TABLES:
        nothing = torch.zeros(8)
        given = {
            "alpha": b.row(name, "beta"),
            "dog": nothing,
            "new": c.row(name, "gamma"),
            "newer": a.row(name, "dog"),
            "mat": c.row(name, "mat"),
            "cat": nothing,
            "the": b.row(name, "beta"),
        }
        how = {"given": given, "forced": ("mat", "cat", "the"), "padding": 3}
        merge = fisher_rows(
            *rows(speakers, name, tokens, a, **how), speakers, name, tokens, [1, 2, 3]
        )
        assert_close({name: found[name]}, {name: merge})
        for token in ("mat", "cat", "the", "new", "newer"):
            assert torch.equal(found[name][tokens.index(token)].double(), given[token].double())
    loads(tmp_path / "out", 16)


def test_equal_fishers_give_linear(speakers, tmp_path):
    """Where all models have a token, and in every row that nobody has: mergekit's own mean."""
    for speaker in speakers:
        write_fishers(speaker.folder, {n: torch.ones_like(t) for n, t in speaker.thetas.items()})
    tokenizer = {
        "source": "union",
        "pad_to_multiple_of": 16,
        "tokens": {"new": {"source": {"kind": "zero"}}},
    }
    content = recipe(speakers, tokenizer=tokenizer, base_model=str(speakers[0].folder))
    found = merged(content, tmp_path / "out")
    content["merge_method"] = "linear"
    for entry, weight in zip(content["models"], (1, 1, 1), strict=True):
        entry["parameters"] = {"weight": weight}
    linear = merged(content, tmp_path / "linear")
    for tensors, folder in ((found, "out"), (linear, "linear")):
        tokens = tokens_of(tmp_path / folder)  # in mergekit's own in no order
        compared = [tokens.index(token) for token in sorted(tokens) if token not in ("dog", "mat")]
        for name in TABLES:  # padding is a mean over all tokens, those that differ too
            assert tensors[name].shape[0] == 16
            tensors[name] = tensors[name][compared]
    assert_close(found, linear)


def test_what_nobody_is_sure_of_is_linear(speakers, tmp_path):
    """Zero Fishers in both tables: the aligned rows' mean, those filled in and padding too."""
    for speaker in speakers:
        fishers = {n: t * 0 if n in TABLES else t for n, t in speaker.fishers.items()}
        write_fishers(speaker.folder, fishers)
    top = {"tokenizer": {"source": "union", "pad_to_multiple_of": 16}}
    content = recipe(speakers, [1, 2, 3], base_model=str(speakers[1].folder), **top)
    found = merged(content, tmp_path / "out")
    content["merge_method"] = "linear"
    for entry in content["models"]:
        entry["parameters"] = {"weight": entry["parameters"]["lambda"]}
    linear = merged(content, tmp_path / "linear")
    for tensors, folder in ((found, "out"), (linear, "linear")):
        tokens = tokens_of(tmp_path / folder)
        compared = [*map(tokens.index, sorted(tokens)), *range(len(tokens), 16)]
        for name in TABLES:
            tensors[name] = tensors[name][compared]
    assert_close({n: found[n] for n in TABLES}, {n: linear[n] for n in TABLES})


def test_a_prior(speakers, tmp_path):
    """The base's own Fisher is zero, too, where the base lacks a token."""
    a, b, base = speakers
    top = {"tokenizer_source": "union", "base_model": str(base.folder)}
    content = recipe([a, b], [0.7, 0.6], parameters={"prior": True}, **top)
    found = merged(content, tmp_path / "out")
    tokens = tokens_of(tmp_path / "out")
    scales = [merge_oracle.scale(s.fishers, s.fishers) for s in speakers]
    for name in TABLES:
        for place, token in enumerate(tokens):
            fill = filled(speakers, name, token, base)
            thetas = [s.row(name, token) if token in s.tokens else fill for s in speakers]
            known = [
                s.row(name, token, "fishers") / scale if token in s.tokens else 0 * fill
                for s, scale in zip(speakers, scales, strict=True)
            ]
            prior = known[2] + 1e-6
            right = sum(
                lam * (prior + f) * (theta - thetas[2])
                for lam, f, theta in zip([0.7, 0.6], known[:2], thetas[:2], strict=True)
            )
            total = prior + 0.7 * known[0] + 0.6 * known[1]
            torch.testing.assert_close(
                found[name][place].double(), thetas[2] + right / total, rtol=1e-4, atol=1e-4
            )


def test_a_tied_head(tmp_path):
    words = ("cat dog the", "the mat cat mouse")
    a, b = make_speakers(tmp_path, words, tie_word_embeddings=True)
    assert HEAD not in a.thetas
    content = recipe([a, b], [1, 2], tokenizer_source="union", base_model=str(a.folder))
    found = merged(content, tmp_path / "out")
    tokens = tokens_of(tmp_path / "out")
    assert_close(found, expected([a, b], tokens, [1, 2], (EMBEDDING,), a))
    loads(tmp_path / "out", len(tokens))


def test_an_encoder_with_a_bias_of_tokens(tmp_path):
    speakers = []
    for seed, words in enumerate(("cat dog the", "the mat cat mouse")):
        folder, tokens = tmp_path / str(seed), (*SPECIAL, *words.split())
        sizes = {**FAMILIES["distilbert"][1], "vocab_size": len(tokens)}
        torch.manual_seed(seed)
        model = transformers.DistilBertForMaskedLM(transformers.DistilBertConfig(**sizes))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        model.save_pretrained(folder)
        fishers = random_fishers(folder, seed)
        write_fishers(folder, fishers)
        give_tokenizer(folder, pairs=False, tokens=tokens)
        speakers.append(Speaker(folder, tokens, read(folder), fishers))
    content = recipe(speakers, [1, 2], tokenizer_source="union")
    found = merged({**content, "base_model": str(speakers[0].folder)}, tmp_path / "out")
    tokens = tokens_of(tmp_path / "out")
    names = ("distilbert.embeddings.word_embeddings.weight", "vocab_projector.bias")
    assert_close(found, expected(speakers, tokens, [1, 2], names, speakers[0]))
    loads(tmp_path / "out", len(tokens))


def test_tokens_that_have_a_number_and_no_row(speakers, tmp_path):
    """As where tokens were added to a tokenizer and the model was not resized: it lacks them."""
    a, b, _ = speakers
    give_tokenizer(b.folder, pairs=False, tokens=(*b.tokens, "alpha", "cow"))
    content = recipe([a, b], [1, 2], tokenizer_source="base", base_model=str(a.folder))
    found = merged(content, tmp_path / "out")
    assert_close(found, expected([a, b], a.tokens, [1, 2], base=a))


def test_an_excluded_head(speakers, tmp_path):
    """base_model's own rows; tokens that it lacks as mergekit fills them in."""
    base = speakers[1]
    content = recipe(speakers, [1, 2, 3], tokenizer_source="union", base_model=str(base.folder))
    found = merged({**content, "parameters": {"exclude": "lm_head"}}, tmp_path / "out")
    tokens = tokens_of(tmp_path / "out")
    tables, _ = rows(speakers, HEAD, tokens, base)
    assert torch.equal(found[HEAD].double(), tables[1])


def test_an_excluded_table_of_another_width(speakers, tmp_path):
    """It has nothing to do with base_model's; tokens that no other has get a row of zeros."""
    a, b, _ = speakers
    wide = torch.zeros(9, 5)
    rewrite(b.folder, {**b.thetas, HEAD: wide})
    write_fishers(b.folder, {**b.fishers, HEAD: wide})
    content = recipe([a, b], tokenizer_source="union", base_model=str(a.folder))
    found = merged({**content, "parameters": {"exclude": ["lm_head"]}}, tmp_path / "out")
    tokens = tokens_of(tmp_path / "out")
    for row, token in zip(found[HEAD], tokens, strict=True):
        expected = a.row(HEAD, token) if token in a.tokens else torch.zeros(8)
        assert torch.equal(row.double(), expected.double())


@pytest.mark.parametrize("unlisted", [False, True])
def test_truncation(tmp_path, unlisted):
    """Rows and Fishers are cut alike, to the smallest, base_model's where it is not merged too."""
    made = make_speakers(tmp_path, ("cat dog the mat", "dog cat the beta gamma", "the cat"))
    merged_ones, base = (made[:2], made[2]) if unlisted else (made[:2], made[0])
    lambdas = [1, 2]
    content = recipe(merged_ones, lambdas, base_model=str(base.folder))
    found = merged(content, tmp_path / "out", unsafe_truncate_embeddings=True)
    scales = [merge_oracle.scale(s.fishers, s.fishers) for s in merged_ones]
    size = len(base.tokens)

    def cut(tensors, name):
        return tensors[name][:size] if name in TABLES else tensors[name]

    expected = {
        name: merge_oracle.merge_tensor(
            [cut(s.thetas, name) for s in merged_ones],
            [cut(s.fishers, name) for s in merged_ones],
            lambdas,
            scales,
        )
        for name in base.thetas
    }
    assert_close(found, expected)
