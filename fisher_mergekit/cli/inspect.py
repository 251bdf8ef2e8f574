"""`mergekit-fisher inspect`: what a sidecar holds and where it comes from."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from fisher_mergekit.errors import SidecarError
from fisher_mergekit.sidecar.page import facts
from fisher_mergekit.sidecar.reader import Sidecar, read_header
from fisher_mergekit.study.mass import OTHER, TYPES, Mass, masses, together


@click.command(
    epilog="""\b
Examples:
  mergekit-fisher inspect ./rte/sidecar
  mergekit-fisher inspect ./rte/sidecar --plot rte.png
"""
)
@click.argument("sidecar", type=click.Path(path_type=Path))
@click.option("--kind", help="Which kind, if there are several.")
@click.option("--tensors", "every_tensor", is_flag=True, help="List every tensor, not layers.")
@click.option(
    "--plot", type=click.Path(path_type=Path), help="Draw the mass by layer to this file."
)
def inspect(sidecar: Path, kind: str | None, every_tensor: bool, plot: Path | None) -> None:
    """Show the header of SIDECAR and its mass by layer and tensor type.

    SIDECAR is a sidecar folder, one of its files, or the folder of a model that has one.
    """
    path = sidecar / "sidecar" if (sidecar / "sidecar").is_dir() else sidecar
    opened = Sidecar(path, kind or _only_kind(path))
    found = masses(opened)
    console = Console()
    _print_header(console, opened)
    if every_tensor:
        _print_tensors(console, found)
    else:
        _print_layers(console, found)
    if plot is not None:
        from fisher_mergekit.study.plots import plot_mass

        plot_mass(found, plot, title=f"{opened.kind} of {opened.header.model.reference}")
        console.print(f"Wrote {plot}.")


def _only_kind(path: Path) -> str:
    header = read_header(path)
    if header is None:
        raise SidecarError(
            f"there is no sidecar at {path}. Measure the model: mergekit-fisher precompute RECIPE"
        )
    kinds = sorted(header.kinds)
    if len(kinds) != 1:
        raise SidecarError(f"{path} holds {', '.join(kinds) or 'nothing'}: choose one with --kind.")
    return kinds[0]


def _print_header(console: Console, sidecar: Sidecar) -> None:
    model = sidecar.header.model
    table = Table.grid(padding=(0, 2))
    rows = {
        "model": f"{model.reference} ({model.architecture})",
        "kind": sidecar.kind,
        **facts(sidecar.measurement),
    }
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/bold]", value.replace("`", ""))
    console.print(table, end="\n\n")


def _print_layers(console: Console, found: list[Mass]) -> None:
    """One row a layer: its mean value by tensor type, and its share of the mass, the sum of all."""
    types = [name for name in (*TYPES, OTHER) if any(m.type == name for m in found)]
    whole = together(found, "all")
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("mean value")
    for name in (*types, "all", "share"):
        table.add_column(name, justify="right")
    for place in (*dict.fromkeys(m.place for m in found), None):
        here = [m for m in found if place in (None, m.place)]
        cells = []
        for name in types:
            part = [m for m in here if m.type == name]
            cells.append(f"{together(part, name).mean:.1e}" if part else "")
        row = together(here, place or "all")
        share = row.total / whole.total if whole.total else 0.0
        label = f"layer {place}" if place is not None and place.isdigit() else row.name
        table.add_row(label, *cells, f"{row.mean:.1e}", f"{share:.1%}")
    console.print(table)
    console.print(
        f"\nRoot mean square over all {whole.count:,} values: {whole.root_mean_square:.3e}"
    )


def _print_tensors(console: Console, found: list[Mass]) -> None:
    """One line a tensor, unwrapped, so that it can be searched and piped."""
    whole = together(found, "all")
    width = max(len(m.name) for m in found)
    console.print(f"{'tensor':{width}}  {'values':>12}  mean      rms       share", soft_wrap=True)
    for m in found:
        share = m.total / whole.total if whole.total else 0.0
        line = (
            f"{m.name:{width}}  {m.count:12,}  {m.mean:.2e}  {m.root_mean_square:.2e}  {share:.2%}"
        )
        console.print(line, soft_wrap=True, highlight=False)
