"""Models of different vocabularies, and what their tables of tokens merge to: a row at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import merge_oracle
import torch
import transformers
from models import Tensors, make_measured
from tokenizers_of_words import SPECIAL, give_tokenizer

FLOOR = 1e-6


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
    made = make_measured(folder, family, seed=seed, **{"vocab_size": len(tokens), **options})
    give_tokenizer(folder, pairs=False, tokens=tokens)
    return Speaker(made[0], tokens, *made[1:])


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
