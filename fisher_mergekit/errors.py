"""Named errors with one base class.

Every message says what went wrong, where, what was expected and what was found, and ends in the
line that mends it. The base class is a `click.ClickException`, so a user's mistake is printed as
one message without a traceback by our own commands *and* by mergekit's, which are click too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import TypeVar

import click

_Found = TypeVar("_Found")


class FisherMergekitError(click.ClickException):
    """Base class of every error that this package raises on purpose."""

    def __str__(self) -> str:
        return self.message


class RecipeError(FisherMergekitError):
    """A recipe that cannot be read, or that asks for something that does not exist."""


class CalibrationError(FisherMergekitError):
    """Calibration data that is missing, empty, or does not fit the model."""


class MeasureError(FisherMergekitError):
    """A model that cannot be measured as asked."""


class CheckpointError(FisherMergekitError):
    """A model's own files are missing, damaged, or not safetensors."""


class SidecarError(FisherMergekitError):
    """A sidecar that is missing, partial, corrupt, or was measured on other weights."""


class SidecarMissing(SidecarError):
    """There is no sidecar, or not of this kind: nothing is damaged, it only has to be measured."""


class UnsupportedMergekit(FisherMergekitError):
    """The installed mergekit is not one that this package knows how to extend."""


class Problems(list[str]):
    """What is wrong, gathered step by step so that all of it can be told at once."""

    def of(self, step: tuple[_Found, Iterable[str]]) -> _Found:
        """Keep what a step found wrong, and return what it found."""
        found, told = step
        self.extend(told)
        return found


class PlanningError(FisherMergekitError):
    """Everything that is wrong with a recipe, found before anything is measured or merged.

    Attributes:
        problems: one self-contained message a problem.
    """

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(problems)
        if len(self.problems) == 1:
            message = self.problems[0]
        else:
            numbered = (f"  {i}. {p}" for i, p in enumerate(self.problems, start=1))
            message = "\n".join((f"{len(self.problems)} problems:", *numbered))
        super().__init__(message)


def nearest(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Return ` Did you mean 'x'?` for the known word nearest to `word`, or nothing."""
    matches = get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def some(names: Sequence[str], most: int = 4) -> str:
    """Return the names, or of many the first ones and how many there are besides."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"
