"""VADER's domains and the Brown corpus's genres, read from their packages in memory."""

from __future__ import annotations

import io
import random
import re
import tarfile
from dataclasses import dataclass

from real.packages import BROWN, VADER

from fisher_mergekit.study.tasks import Sizes, Task, split

SENTIMENTS = ("negative", "neutral", "positive")
NEUTRAL = 0.5
"""Mean ratings, from -4 to 4, up to this far from 0 are neutral."""

DOMAINS = {
    "tweets": "tweets",
    "amazon": "amazonReviewSnippets",
    "movies": "movieReviewSnippets",
    "editorials": "nytEditorialSnippets",
}


def sentiment(domain: str, sizes: Sizes, *, seed: int = 0) -> Task:
    """Return one of VADER's domains: is this tweet or sentence negative, neutral or positive?"""
    with tarfile.open(VADER.bring()) as package:
        data = read(package, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(data)) as files:
        lines = read(files, f"hutto_ICWSM_2014/{DOMAINS[domain]}_GroundTruth.txt").decode()
    rows = []
    for line in lines.splitlines():
        _, rating, text = line.split("\t")
        rows.append((text, 1 + (float(rating) > NEUTRAL) - (float(rating) < -NEUTRAL)))
    return split(domain, SENTIMENTS, rows, sizes, seed=seed)


@dataclass(frozen=True)
class Genre:
    """Passages of one genre, of different documents to train on and held out."""

    name: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]


def genre(name: str, letter: str, *, train: int, held_out: int) -> Genre:
    """Return passages of a genre of the Brown corpus, known by the letter of its documents."""
    with tarfile.open(BROWN.bring()) as package:
        documents = sorted(n for n in package.getnames() if re.search(rf"/c{letter}\d\d$", n))
        random.Random(name).shuffle(documents)
        half = len(documents) // 2

        def first(count: int, chosen: list[str]) -> tuple[str, ...]:
            """Return passages of all the documents in turn, so that none prevails."""
            found = [passages(read(package, n).decode()) for n in chosen]
            turns = [passage for turn in zip(*found, strict=False) for passage in turn]
            assert len(turns) >= count
            return tuple(turns[:count])

        return Genre(name, first(train, documents[:half]), first(held_out, documents[half:]))


def passages(document: str, words: int = 75) -> list[str]:
    """Return the plain text of a tagged document, in pieces of whole sentences."""
    found, piece = [], []
    for line in filter(None, map(str.strip, document.splitlines())):
        piece += [token.rpartition("/")[0] for token in line.split()]
        if len(piece) >= words:
            found.append(plain(piece))
            piece = []
    return found


def plain(tokens: list[str]) -> str:
    """Join words as they are printed."""
    text = " ".join(tokens).replace("``", '"').replace("''", '"').replace("; ;", ";")
    text = re.sub(r'" ([^"]*) "', r'"\1"', text)
    return re.sub(r" ([.,;:?!)])", r"\1", text).replace("( ", "(")


def read(archive: tarfile.TarFile, name: str) -> bytes:
    member = archive.extractfile(name)
    assert member is not None
    return member.read()
