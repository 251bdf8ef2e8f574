"""`mergekit-fisher`, one file a subcommand.

Subcommands are imported when they are called, so that `--help` answers at once. To add one, write
`NAME.py` here with a click command called NAME, and its line below.
"""

from __future__ import annotations

import os
from importlib import import_module

import click

from fisher_mergekit import __version__

# Read when transformers is first imported. It warns of much; what matters of it, we check and say.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# Read when torch is first imported. Measuring is many short parallel loops. Threads that sleep at
# once when they wait for each other make it twice as slow on an idle machine, and threads that spin
# for long make it ten times slower as soon as another process wants a core: they spin for a moment.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # a fraction of a millisecond
    os.environ.setdefault("KMP_BLOCKTIME", "1")  # a millisecond, the least that Intel's has

SUBCOMMANDS = {
    "precompute": "Measure the models of a recipe and write their sidecars.",
    "inspect": "Show what a sidecar holds and where it comes from.",
    "demo": "The whole story on a real model and real text, in a few minutes.",
}


class _Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SUBCOMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in SUBCOMMANDS:
            return None
        command: click.Command = getattr(import_module(f"{__name__}.{name}"), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(SUBCOMMANDS.items()))


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mergekit-fisher")
def main() -> None:
    """Measure what fine-tuned models are sure of, for merging with mergekit.

    \b
    mergekit-fisher precompute recipe.yml     measure every model of a recipe, once
    mergekit-yaml recipe.yml merged/          merge (mergekit's own command)
    """  # noqa: D301 - click wants the character itself
