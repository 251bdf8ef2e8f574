"""`regmean` and `mats` on models of different vocabularies, against the equation written whole."""

import pytest
import tiny
import torch
from factors import mean, merged_matrix, scale
from models import make_model, random_fishers, read, write_fishers
from precomputing import succeed, write_recipe
from running import assert_close, command, merged, mergekit_yaml, recipe_of
from tokenizers_of_words import SPECIAL, give_tokenizer
from vocabulary_oracle import (
    EMBEDDING,
    HEAD,
    WORDS,
    dense,
    fisher_rows,
    loads,
    make_described_speaker,
    rows,
    tokens_of,
)

pytestmark = pytest.mark.slow  # exhaustive: not needed at every change

METHODS = {"gram": "regmean", "kfac": "mats"}
both_kinds = pytest.mark.parametrize("kind", list(METHODS))
LAMBDAS = [0.5, 0.3, 0.2]


def speakers_of(place, kind, words=WORDS, **options):
    made = [
        make_described_speaker(place / name, w, kind, seed=seed, scale=10.0**seed, **options)
        for seed, (name, w) in enumerate(zip("abc", words, strict=False))
    ]
    return [speaker for speaker, _ in made], [described for _, described in made]


def recipe(speakers, kind, lambdas=LAMBDAS, *, base=0, **top):
    parameters = top.pop("parameters", {}) | ({"tolerance": 1e-10} if kind == "kfac" else {})
    return recipe_of(
        *(s.folder for s in speakers),
        method=METHODS[kind],
        lambdas=lambdas,
        parameters=parameters,
        base_model=str(speakers[base].folder),
        **top,
    )


def check(found, expected):
    assert_close({name: found[name] for name in expected}, expected, rtol=1e-4, atol=1e-4)


def scales_of(described, kind, names):
    return [scale(made, names) for made in described] if kind == "kfac" else None


@both_kinds
def test_a_union_by_the_command(tmp_path, kind):
    """Head and embedding by their factors; the head's Gram is each group's of tokens by itself."""
    speakers, described = speakers_of(tmp_path, kind)
    options = {"embeddings": True}
    content = recipe(speakers, kind, parameters=options, tokenizer={"pad_to_multiple_of": 8})
    process, out = mergekit_yaml(content, tmp_path)
    assert process.returncode == 0, process.stderr
    found, tokens = read(out), tokens_of(out)
    padding = 16 - len(tokens)
    assert padding > 0
    scales = scales_of(described, kind, described[0].factors)
    expected = {
        name: dense(
            speakers, described, name, tokens, LAMBDAS,
            base=speakers[0], scales=scales, padding=padding,
        )
        for name in (EMBEDDING, HEAD)
    }  # fmt: skip
    for name in (n for n in described[0].thetas if n not in expected):
        parts = list(zip(described, [name] * 3, LAMBDAS, strict=True))
        expected[name] = (
            merged_matrix(parts, scales)
            if name in described[0].factors
            else mean([made.thetas[name] for made in described], LAMBDAS)
        )
    assert set(found) == set(expected)
    check(found, expected)
    for speaker, token in zip(speakers, ("alpha", "beta", "gamma"), strict=True):
        for name in (EMBEDDING, HEAD):
            torch.testing.assert_close(
                found[name][tokens.index(token)].double(), speaker.row(name, token)
            )


def test_a_head_whose_output_factor_is_a_diagonal(tmp_path):
    """As of every vocabulary of any size."""
    speakers, described = speakers_of(tmp_path, "kfac", WORDS[:2])
    for made in described:
        stored = made.factors[HEAD].outputs
        made.stored[stored] = made.stored[stored].diagonal().clone()
        made.write()
    content = recipe(speakers, "kfac", [1, 3], tokenizer_source="union")
    found = merged(content, tmp_path / "out")
    tokens = tokens_of(tmp_path / "out")
    names = [n for n in described[0].factors if n != EMBEDDING]
    scales = scales_of(described, "kfac", names)
    expected = dense(speakers, described, HEAD, tokens, [1, 3], base=speakers[0], scales=scales)
    check(found, {HEAD: expected})


@both_kinds
def test_few_rows(tmp_path, kind):
    """Inputs of which little was seen: a token keeps its only row to the last bits there, too."""
    speakers, _ = speakers_of(tmp_path, kind, rows=2)
    found = merged(recipe(speakers, kind, tokenizer_source="union"), tmp_path / "out")
    tokens = tokens_of(tmp_path / "out")
    for speaker, token in zip(speakers, ("alpha", "beta", "gamma"), strict=True):
        row = found[HEAD][tokens.index(token)].double()
        torch.testing.assert_close(row, speaker.row(HEAD, token), rtol=1e-5, atol=1e-5)


@both_kinds
@pytest.mark.parametrize("others", ["mean", "fisher"])
def test_an_embedding_by_others(tmp_path, kind, others):
    """The mean of mergekit's aligned rows, as its `linear`; or by the Fisher of each own row."""
    speakers, described = speakers_of(tmp_path, kind)
    for seed, (speaker, made) in enumerate(zip(speakers, described, strict=True)):
        fishers = random_fishers(speaker.folder, seed)
        write_fishers(speaker.folder, fishers)
        made.write()
        # The scale is that of what is merged by it.
        speaker.fishers = {
            n: f for n, f in fishers.items() if n not in made.factors or n == EMBEDDING
        }
    content = recipe(speakers, kind, parameters={"others": others}, tokenizer_source="union")
    found = merged(content, tmp_path / "out")
    tokens = tokens_of(tmp_path / "out")
    tables, own = rows(speakers, EMBEDDING, tokens, speakers[0])
    expected = mean(tables, LAMBDAS)
    if others == "fisher":
        expected = fisher_rows(tables, own, speakers, EMBEDDING, tokens, LAMBDAS)
    check(found, {EMBEDDING: expected})


@both_kinds
@pytest.mark.parametrize("diagonal", [False, True])
def test_truncation(tmp_path, kind, diagonal):
    """Rows and what was measured of them are cut alike."""
    speakers, described = speakers_of(tmp_path, kind, ("cat dog the", "dog cat the mat on"))
    for made in described if diagonal and kind == "kfac" else ():
        stored = made.factors[HEAD].outputs
        made.stored[stored] = made.stored[stored].diagonal().clone()
        made.write()
    content = recipe(speakers, kind, [1, 2], parameters={"embeddings": True})
    found = merged(content, tmp_path / "out", unsafe_truncate_embeddings=True)
    scales = scales_of(described, kind, described[0].factors)
    size = len(speakers[0].tokens)
    big = described[1]
    for name in (EMBEDDING, HEAD):
        big.thetas[name] = big.thetas[name][:size]
        record = big.factors[name]
        along = record.inputs if name == EMBEDDING else record.outputs
        if along is not None:
            cut = big.stored[along][:size]
            big.stored[along] = cut if cut.ndim == 1 else cut[:, :size]
    parts = {n: [(made, n, lam) for made, lam in zip(described, [1, 2], strict=True)]
             for n in (EMBEDDING, HEAD)}  # fmt: skip
    check(found, {name: merged_matrix(part, scales) for name, part in parts.items()})


@both_kinds
def test_a_forced_token(tmp_path, kind):
    """It is obeyed, and does not bend the others."""
    speakers, described = speakers_of(tmp_path, kind)
    tokens = {"cat": {"source": {"kind": "zero"}, "force": True}}
    content = recipe(speakers, kind, tokenizer={"source": "base", "tokens": tokens})
    found = merged(content, tmp_path / "out")
    how = {"given": {"cat": torch.zeros(8)}, "forced": ("cat",)}
    names = [n for n in described[0].factors if n != EMBEDDING]
    expected = dense(
        speakers, described, HEAD, speakers[0].tokens, LAMBDAS,
        base=speakers[0], scales=scales_of(described, kind, names), **how,
    )  # fmt: skip
    check(found, {HEAD: expected})
    assert not found[HEAD][speakers[0].tokens.index("cat")].any()
    assert not found[EMBEDDING][speakers[0].tokens.index("cat")].any()


@both_kinds
def test_sources_of_single_tokens(tmp_path, kind):
    """Each way to name a source, in the vocabulary of a model that is not the base."""
    speakers, described = speakers_of(tmp_path, kind)
    a, b, c = speakers

    def of(speaker, **token):
        return {"kind": "model_token", "model": str(speaker.folder), **token}

    configs = {
        "new": {"source": of(a, token="alpha")},  # nobody has it
        "dog": {"source": of(a, token_id=a.tokens.index("the"))},  # c lacks it
        "beta": {"source": {"kind": "zero"}},  # only b has it, and keeps it
        "mat": {"source": str(c.folder), "force": True},
    }
    content = recipe(speakers, kind, tokenizer={"source": str(b.folder), "tokens": configs})
    found = merged(content, tmp_path / "out")
    tokens = tokens_of(tmp_path / "out")
    assert set(tokens) == {*b.tokens, "new"}
    given = {
        "new": a.row(HEAD, "alpha"),
        "dog": a.row(HEAD, "the"),
        "beta": torch.zeros(8),
        "mat": c.row(HEAD, "mat"),
    }
    names = [n for n in described[0].factors if n != EMBEDDING]
    expected = dense(
        speakers, described, HEAD, tokens, LAMBDAS, base=a,
        scales=scales_of(described, kind, names), given=given, forced=("mat",),
    )  # fmt: skip
    check(found, {HEAD: expected})
    for token in ("new", "mat"):
        row = found[HEAD][tokens.index(token)].double()
        torch.testing.assert_close(row, given[token], rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", ["fisher", "regmean", "mats"])
def test_measured_and_merged(tmp_path, method, tied):
    """One recipe for both commands: what was measured of a tied head's rows goes along, too."""
    words = ("the film was very good alpha", "the cat sat not good beta bad")
    folders = []
    for seed, (name, w) in enumerate(zip("ab", words, strict=True)):
        tokens = (*SPECIAL, *w.split())
        folders.append(make_model(
            tmp_path / name, "llama", seed=seed, vocab_size=len(tokens), tie_word_embeddings=tied,
            pad_token_id=0,
        ))  # fmt: skip
        give_tokenizer(folders[-1], pairs=False, tokens=tokens)
    path = write_recipe(
        tmp_path,
        *folders,
        calibration={"path": str(tiny.write_rows(tmp_path / "data.jsonl")), "text": "text"},
        merge_method=method,
        base_model=str(folders[0]),
        tokenizer={"source": "union", "pad_to_multiple_of": 4},
        parameters={} if method == "fisher" else {"embeddings": True},
    )
    succeed(path)
    process = command("mergekit-yaml", path, tmp_path / "out", "--quiet")
    assert process.returncode == 0, process.stderr
    found, tokens = read(tmp_path / "out"), tokens_of(tmp_path / "out")
    assert (HEAD in found) != tied
    loads(tmp_path / "out", -(-len(tokens) // 4) * 4)
    models = [read(folder) for folder in folders]
    vocabularies = [tokens_of(folder) for folder in folders]
    for name in (EMBEDDING,) if tied else (EMBEDDING, HEAD):
        for token in tokens:
            own = [
                model[name][vocabulary.index(token)]
                for model, vocabulary in zip(models, vocabularies, strict=True)
                if token in vocabulary
            ]
            row = found[name][tokens.index(token)]
            if len(own) == 1:
                torch.testing.assert_close(row, own[0], rtol=1e-5, atol=1e-5)
    shared = [tokens.index(token) for token in ("the", "good")]
    average = torch.stack([
        model["model.norm.weight"] for model in models
    ]).mean(0)  # fmt: skip
    assert found[EMBEDDING][shared].isfinite().all()
    assert torch.allclose(found["model.norm.weight"], average) == (method != "fisher")
