"""Flags that several subcommands share, spelt as mergekit spells them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import click
from mergekit.options import ShardSizeParamType


class ShardSize(ShardSizeParamType):
    """A size as mergekit writes it (`5B`, `200M`, `10k`); anything else is one sentence."""

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """Return the number of bytes."""
        try:
            size: int = super().convert(value, param, ctx)
        except (ValueError, IndexError):  # of nothing
            size = 0
        if size <= 0:
            self.fail(f"{value!r} is not a size such as 5B, 200M or 10k.", param, ctx)
        return size


class Choices(click.ParamType):  # type: ignore[type-arg]
    """One or several of some words, with commas between them."""

    name = "words"

    def __init__(self, words: Sequence[str]):
        self.words = words

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        """Return the words, each once."""
        given = value if isinstance(value, tuple) else value.split(",")
        chosen = tuple(dict.fromkeys(word.strip() for word in given))
        for word in chosen:
            if word not in self.words:
                self.fail(f"{word!r} is not one of {', '.join(self.words)}.", param, ctx)
        return chosen


def add_common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `-v`, `--quiet` and `-j`."""
    for option in (
        click.option("-v", "--verbose", "verbosity", count=True, help="Say more; -vv for all."),
        click.option("--quiet", is_flag=True, help="No progress bars and no summary."),
        click.option(
            "-j", "--num-threads", type=click.IntRange(min=1), help="Number of CPU threads."
        ),
    ):
        command = option(command)
    return command


def apply_common_options(verbosity: int, quiet: bool, num_threads: int | None) -> None:
    """Set the log level, the progress bars and the number of threads, as mergekit does."""
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbosity, 2)]
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s")
    if quiet:
        import datasets
        import transformers.utils.logging

        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    if num_threads is not None:
        import torch

        torch.set_num_threads(num_threads)
