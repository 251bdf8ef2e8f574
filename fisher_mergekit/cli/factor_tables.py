"""The part of `mergekit-fisher inspect` that is about factors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from rich.console import Console
from rich.table import Table

from fisher_mergekit.study.factors import Factor
from fisher_mergekit.study.mass import OTHER, TYPES, label_of, order, place_of, type_of

_LEGEND = (
    "Effective rank, (tr A)² / ‖A‖², in percent of a factor's width: in how many directions the "
    "inputs, or the outputs' gradients, vary. Off-diagonal: the share of ‖A‖² off the diagonal. "
    "Of several factors, the means."
)


def print_factors(console: Console, factors: Mapping[str, Factor]) -> None:
    """Print the effective rank by layer and tensor type: of the inputs, then of the outputs."""
    for role in ("inputs", "outputs"):
        chosen = _sorted(factor for factor in factors.values() if factor.role == role)
        if not chosen:
            continue
        types = [t for t in (*TYPES, OTHER) if any(_type(f) == t for f in chosen)]
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 0, 0, 1))
        table.add_column(f"rank of {role}")
        for name in (*types, "all", "off-diagonal"):
            table.add_column(name, justify="right")
        for place in (*dict.fromkeys(map(_place, chosen)), None):
            here = [f for f in chosen if place in (None, _place(f))]
            cells = [_rank([f for f in here if _type(f) == name]) for name in types]
            table.add_row(label_of(place or "all"), *cells, _rank(here), _off_diagonal(here))
        console.print()
        console.print(table)
        console.print(_summary(role, chosen))
    console.print(f"\n{_LEGEND}")


def print_every_factor(console: Console, factors: Mapping[str, Factor]) -> None:
    """Print one line a factor, unwrapped, so that it can be searched and piped."""
    size = max(len(name) for name in factors)
    console.print(
        f"\n{'factor':{size}}   width  blocks  weights  mean           rank  off-diagonal",
        soft_wrap=True,
    )
    for f in _sorted(factors.values()):
        console.print(
            f"{f.name:{size}}  {f.width:6,}  {len(f.diagonal):6,}  {len(f.weights):7,}  "
            f"{f.mean:.2e}  {f.effective_rank:9,.1f}  {_off_diagonal([f]) or 'diagonal'}",
            soft_wrap=True,
            highlight=False,
        )


def _sorted(factors: Iterable[Factor]) -> list[Factor]:
    return sorted(factors, key=lambda factor: order(factor.name))


def _place(factor: Factor) -> str:
    return place_of(factor.weights[0])


def _type(factor: Factor) -> str:
    return type_of(factor.weights[0])


def _rank(factors: Sequence[Factor]) -> str:
    return f"{fmean(f.effective_rank / f.width for f in factors):.1%}" if factors else ""


def _off_diagonal(factors: Sequence[Factor]) -> str:
    shares = [f.off_diagonal for f in factors if f.off_diagonal is not None]
    return f"{fmean(shares):.1%}" if shares else ""


def _summary(role: str, factors: Sequence[Factor]) -> str:
    """Say how many factors there are, how wide, and how many weights they describe."""
    diagonals = sum(not factor.is_matrix for factor in factors)
    narrow, wide = min(f.width for f in factors), max(f.width for f in factors)
    widths = f"{narrow:,}" if narrow == wide else f"{narrow:,} to {wide:,}"
    shared = sum(len(factor.weights) > 1 for factor in factors)
    parts = [f"{len(factors):,} factors of {widths} {role}"]
    if diagonals:
        parts.append(f"{diagonals:,} of them a diagonal")
    parts.append(f"for {sum(len(f.weights) for f in factors):,} weights")
    return ", ".join(parts) + (f"; {shared:,} shared" if shared else "") + "."
