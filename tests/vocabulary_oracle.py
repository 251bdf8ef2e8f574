"""Models of different vocabularies, and what their tables of tokens merge to: a row at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import dense_oracle
import merge_oracle
import torch
import transformers
from factors import Described, make_described
from models import Tensors, make_measured
from running import recipe_of
from tokenizers_of_words import SPECIAL, give_tokenizer

FLOOR = 1e-6
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TABLES = (EMBEDDING, HEAD)
"""Those of an untied Llama."""
WORDS = ("cat dog the alpha", "dog the beta cat mat", "mat the gamma cat")
"""Of three models that share some, in different places; each has one that no other has."""


@dataclass
class Speaker:
    """A measured model whose row i of tokens is `tokens[i]`."""

    folder: Path
    tokens: tuple[str, ...]
    thetas: Tensors
    fishers: Tensors = field(default_factory=dict)

    def row(self, name: str, token: str, of: str = "thetas") -> torch.Tensor:
        """Return a token's row of a tensor, float64."""
        return getattr(self, of)[name][self.tokens.index(token)].double()


def make_speaker(
    folder: Path, words: str, family: str = "llama", *, seed: int = 0, **options: object
) -> Speaker:
    """Make a model of the special tokens and these words."""
    tokens = (*SPECIAL, *words.split())
    sizes = {} if "text_config" in options else {"vocab_size": len(tokens)}
    made = make_measured(folder, family, seed=seed, **sizes, **options)
    give_tokenizer(folder, pairs=False, tokens=tokens)
    return Speaker(made[0], tokens, *made[1:])


def make_speakers(
    place: Path, words: Sequence[str] = WORDS, family: str = "llama", **options: object
) -> list[Speaker]:
    """Make a model a text of words, `a`, `b` and so on."""
    return [
        make_speaker(place / name, text, family, seed=seed, **options)
        for seed, (name, text) in enumerate(zip("abcd", words, strict=False))
    ]


def recipe(speakers: Sequence[Speaker], lambdas: list | None = None, **top: object) -> dict:
    """Return a recipe that lists the models."""
    return recipe_of(*(s.folder for s in speakers), lambdas=lambdas, **top)


def make_described_speaker(
    folder: Path, words: str, kind: str, family: str = "llama", **options: object
) -> tuple[Speaker, Described]:
    """Make a model of the special tokens and these words, described by factors."""
    tokens = (*SPECIAL, *words.split())
    made = make_described(folder, family, kind, **{"vocab_size": len(tokens), **options})
    give_tokenizer(folder, pairs=False, tokens=tokens)
    return Speaker(folder, tokens, made.thetas), made


def tokens_of(out: Path) -> list[str]:
    """Return the tokens of a merged model, by the number of their rows."""
    vocabulary = transformers.AutoTokenizer.from_pretrained(out).get_vocab()
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    return sorted(vocabulary, key=vocabulary.__getitem__)


def filled(
    speakers: Sequence[Speaker], name: str, token: str, base: Speaker | None
) -> torch.Tensor:
    """Return what a model without the token gets: the only row, base_model's, or the mean."""
    having = [s for s in speakers if token in s.tokens]
    if not having:
        return torch.zeros(speakers[0].thetas[name].shape[1:], dtype=torch.float64)
    if len(having) > 1 and base in having:
        having = [base]
    return torch.stack([s.row(name, token) for s in having]).mean(0)


def rows(
    speakers: Sequence[Speaker],
    name: str,
    tokens: Sequence[str],
    base: Speaker | None = None,
    *,
    given: Mapping[str, torch.Tensor] | None = None,
    forced: Sequence[str] = (),
    padding: int = 0,
) -> tuple[list[torch.Tensor], list[list[bool]]]:
    """Return each model's aligned table, and which rows in it are its own.

    Args:
        given: rows that the recipe names a source for.
        forced: those of them that hold for all models.
        padding: rows behind the last token.
    """
    given = given or {}
    tables, own = [], []
    for speaker in speakers:
        has = [token in speaker.tokens and token not in forced for token in tokens]
        table = [
            speaker.row(name, token)
            if there
            else given.get(token, filled(speakers, name, token, base)).double()
            for token, there in zip(tokens, has, strict=True)
        ]
        mean = torch.stack(table).mean(0)
        tables.append(torch.stack([*table, *[mean] * padding]))
        own.append([*has, *[False] * padding])
    return tables, own


def fisher_rows(
    tables: Sequence[torch.Tensor],
    own: Sequence[Sequence[bool]],
    speakers: Sequence[Speaker],
    name: str,
    tokens: Sequence[str],
    lambdas: Sequence[float],
) -> torch.Tensor:
    """Merge aligned tables: a row that is not a model's own has Fisher zero, and the floor."""
    top = torch.zeros_like(tables[0])
    bottom = torch.zeros_like(top)
    for table, has, speaker, lam in zip(tables, own, speakers, lambdas, strict=True):
        scale = merge_oracle.scale(speaker.fishers, speaker.fishers)
        for i, there in enumerate(has):
            known = speaker.row(name, tokens[i], "fishers") / scale if there else 0.0
            top[i] += lam * (known + FLOOR) * table[i]
            bottom[i] += lam * (known + FLOOR)
    return top / bottom


def expected(
    speakers: Sequence[Speaker],
    tokens: Sequence[str],
    lambdas: Sequence[float],
    tables: Sequence[str] = TABLES,
    base: Speaker | None = None,
    **how: object,
) -> Tensors:
    """Return the whole merged model; of speakers of lambda 0 only what they fill in."""
    counting = [s for s, lam in zip(speakers, lambdas, strict=True) if lam]
    plain = [n for n in counting[0].thetas if n not in tables]
    scales = [merge_oracle.scale(s.fishers, s.fishers) for s in counting]
    own = [lam for lam in lambdas if lam]
    result = {
        name: merge_oracle.merge_tensor(
            [s.thetas[name] for s in counting], [s.fishers[name] for s in counting], own, scales
        )
        for name in plain
    }
    for name in tables:
        aligned = rows(speakers, name, tokens, base, **how)
        kept = [[x for x, lam in zip(part, lambdas, strict=True) if lam] for part in aligned]
        result[name] = fisher_rows(*kept, counting, name, tokens, own)
    return result


def loads(out: Path, size: int) -> None:
    """Check that transformers loads the merged model, with its tokenizer."""
    config = transformers.AutoConfig.from_pretrained(out)
    assert config.vocab_size == size
    architecture = getattr(transformers, config.architectures[0])
    model, info = architecture.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert len(tokenizer) <= size
    model(
        **{
            k: v
            for k, v in tokenizer("the cat", return_tensors="pt").items()
            if k != "token_type_ids"
        }
    )


def dense(
    speakers: Sequence[Speaker],
    described: Sequence[Described],
    name: str,
    tokens: Sequence[str],
    lambdas: Sequence[float],
    *,
    base: Speaker | None = None,
    scales: Sequence[float] | None = None,
    **how: object,
) -> torch.Tensor:
    """Merge one table of tokens by the equation written down whole, for Kronecker factors.

    What is measured of a token that a model lacks is zero, and what couples tokens that other
    models have is, too. Where nobody knows anything, the mean stays.
    """
    tables, own = rows(speakers, name, tokens, base, **how)  # type: ignore[arg-type]
    known = [i for i in range(len(tables[0])) if any(has[i] for has in own)]
    pattern = [tuple(has[i] for has in own) for i in known]
    alike = torch.tensor([[p == q for q in pattern] for p in pattern]).double()
    matrices, thetas = [], []
    for index, (speaker, made) in enumerate(zip(speakers, described, strict=True)):
        record = made.factors[name]
        a = dense_oracle.as_matrix(made.stored[record.inputs])
        height = made.matrix(name).shape[0]
        b = dense_oracle.as_matrix(
            made.stored[record.outputs] if record.outputs else torch.ones(height)
        )
        picked = torch.zeros(len(known), len(speaker.tokens), dtype=torch.float64)
        for row, i in enumerate(known):
            if own[index][i]:
                picked[row, speaker.tokens.index(tokens[i])] = 1
        theta = tables[index][known]
        if record.input_axis == -1:
            b = picked @ b @ picked.T * alike
        else:
            a, theta = picked @ a @ picked.T * alike, theta.T
        scale = scales[index] if scales else 1.0
        a, b = (dense_oracle.shrunk(x, 0.9) for x in (a, b))
        matrices.append(lambdas[index] / scale * torch.kron(b, a))
        thetas.append(theta)
    found = dense_oracle.solution(matrices, thetas)
    result = sum(lam * t for lam, t in zip(lambdas, tables, strict=True)) / sum(lambdas)
    result[known] = found if described[0].factors[name].input_axis == -1 else found.T
    return result
