"""`mergekit-fisher inspect`: what a sidecar holds and where it comes from."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fisher_mergekit.cli.factor_tables import print_every_factor, print_factors
from fisher_mergekit.errors import SidecarError
from fisher_mergekit.methods import METHODS
from fisher_mergekit.sidecar.header import HEADER_NAME
from fisher_mergekit.sidecar.location import FOLDER_NAME, files_of
from fisher_mergekit.sidecar.page import facts
from fisher_mergekit.sidecar.reader import Sidecar, read_header
from fisher_mergekit.study.factors import read_factors
from fisher_mergekit.study.mass import OTHER, TYPES, Mass, factor_masses, label_of, masses, together


@click.command(
    epilog="""\b
Examples:
  mergekit-fisher inspect ./rte/sidecar
  mergekit-fisher inspect ./rte/sidecar --plot rte.png
"""
)
@click.argument("sidecar", type=click.Path(path_type=Path))
@click.option("--kind", help="Only this kind.")
@click.option("--tensors", "every_tensor", is_flag=True, help="List every tensor, not layers.")
@click.option(
    "--plot", type=click.Path(path_type=Path), help="Draw the mass by layer to this file."
)
def inspect(sidecar: Path, kind: str | None, every_tensor: bool, plot: Path | None) -> None:
    """Show the header of SIDECAR and its mass by layer and tensor type, kind by kind.

    SIDECAR is a sidecar folder, one of its files, or a model that has one: its folder, its Hub
    name, or MODEL+ADAPTER.
    """
    path = _place(sidecar, kind)
    kinds = [kind] if kind else _kinds(path)
    if plot is not None and len(kinds) > 1:
        raise SidecarError(f"{path} holds {', '.join(kinds)}: choose one to draw with --kind.")
    console = Console()
    for number, name in enumerate(kinds):
        if number:
            console.print()
        found, title = _show(console, Sidecar(path, name), every_tensor)
        if plot is not None:
            from fisher_mergekit.study.plots import plot_mass

            plot_mass(found, plot, title=title)
            console.print(f"Wrote {plot}.")


def _place(given: Path, kind: str | None) -> Path:
    """Return the sidecar of what was given: itself, or a model's, where merging looks for it."""
    if given.exists():
        return _inside(given)
    # Only now, because they take seconds to import.
    from mergekit.common import ModelReference

    from fisher_mergekit.cli.local import sidecar_places

    try:
        places = sidecar_places(ModelReference.parse(str(given)))
    except RuntimeError:
        places = ()
    kinds = [kind] if kind else [method.kind for method in METHODS.values()]
    found = next((p for p in places if any(files_of(p, name) for name in kinds)), None)
    if found is None:
        raise SidecarError(
            f"there is no file or folder {given}, and no sidecar of a model of this name"
            + (f" at {' or '.join(map(str, places))}" if places else "")
            + ". Measure the model: mergekit-fisher precompute RECIPE"
        )
    return found


def _inside(given: Path) -> Path:
    """Return the sidecar in a model's folder; or what was given, if it is none."""
    own = given / FOLDER_NAME
    of_pairs = [p for p in sorted(given.glob(f"{FOLDER_NAME}-*")) if (p / HEADER_NAME).is_file()]
    if not of_pairs:
        return own if own.is_dir() else given
    found = [*([own] if (own / HEADER_NAME).is_file() else []), *of_pairs]
    if len(found) > 1:  # an adapter's own, and those of the models that it is put on
        raise SidecarError(
            f"{given} holds {len(found)} sidecars: name one of {', '.join(map(str, found))}."
        )
    return found[0]


def _kinds(path: Path) -> list[str]:
    header = read_header(path)
    if header is None:
        raise SidecarError(
            f"there is no sidecar at {path}. Measure the model: mergekit-fisher precompute RECIPE"
        )
    if not header.kinds:
        raise SidecarError(
            f"{path} holds nothing: its writing was interrupted. Measure the model again: "
            "mergekit-fisher precompute RECIPE"
        )
    return sorted(header.kinds)


def _show(console: Console, sidecar: Sidecar, every_tensor: bool) -> tuple[list[Mass], str]:
    """Print one kind; return its mass, and what it is of."""
    factors = read_factors(sidecar)
    found = factor_masses(sidecar, factors) if factors else masses(sidecar)
    _print_header(console, sidecar)
    if every_tensor:
        _print_tensors(console, found)
        if factors:
            print_every_factor(console, factors)
    else:
        _print_layers(console, found)
        if factors:
            print_factors(console, factors)
        else:
            _print_scale(console, found)
    return found, f"{sidecar.kind} of {sidecar.header.model.reference}"


def _print_header(console: Console, sidecar: Sidecar) -> None:
    model = sidecar.header.model
    table = Table.grid(padding=(0, 2))
    rows = {
        "model": f"{model.reference} ({model.architecture})",
        "kind": sidecar.kind,
        **facts(sidecar.measurement),
    }
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/bold]", escape(value.replace("`", "")))
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
        label = label_of(place or row.name)
        table.add_row(label, *cells, f"{row.mean:.1e}", f"{share:.1%}")
    console.print(table)


def _print_scale(console: Console, found: list[Mass]) -> None:
    whole = together(found, "all")
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
