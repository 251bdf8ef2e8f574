"""Pictures, drawn with matplotlib (the `plot` extra)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fisher_mergekit.errors import FisherMergekitError
from fisher_mergekit.study.mass import OTHER, TYPES, Mass, together


def load_pyplot() -> Any:
    """Return matplotlib.pyplot with a back end that needs no screen.

    Raises:
        FisherMergekitError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise FisherMergekitError(
            "pictures need matplotlib: pip install 'fisher_mergekit[plot]', or '.[plot]' in a clone"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_mass(masses: Sequence[Mass], file: Path, *, title: str) -> None:
    """Draw the Fisher mass by layer, and the mean value by layer and tensor type, to a file.

    Raises:
        FisherMergekitError: matplotlib is missing, or the file cannot be written.
    """
    pyplot = load_pyplot()
    places = list(dict.fromkeys(mass.place for mass in masses))
    size = (max(6.0, 0.3 * len(places) + 2), 5.0)
    figure, (upper, lower) = pyplot.subplots(2, sharex=True, figsize=size, dpi=150)
    heights = [together((m for m in masses if m.place == p), p).total for p in places]
    upper.bar(range(len(places)), heights, width=0.8, color="0.6")
    upper.set_ylabel("mass (sum)")
    upper.set_title(title)
    for kind in (*TYPES, OTHER):
        parts = {p: [m for m in masses if (m.place, m.type) == (p, kind)] for p in places}
        points = [(i, together(parts[p], p).mean) for i, p in enumerate(places) if parts[p]]
        if points:
            lower.plot(*zip(*points, strict=True), "o-", label=kind, markersize=4, linewidth=1)
    lower.set_ylabel("mean value")
    lower.set_xlabel("layer")
    lower.set_xticks(range(len(places)), places, rotation=0 if len(places) < 16 else 90)
    lower.legend(frameon=False, fontsize="small", ncols=len(TYPES) + 1, loc="lower center",
                 bbox_to_anchor=(0.5, 1.0))  # fmt: skip
    for axes in (upper, lower):
        # Layers differ by orders of magnitude; on a linear axis one of them is all there is.
        axes.set_yscale("log")
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, file)


def save(figure: Any, file: Path) -> None:
    """Save and close a figure.

    Raises:
        FisherMergekitError: the file cannot be written, or its ending is no picture format.
    """
    figure.tight_layout()
    try:
        figure.savefig(file)
    except (OSError, ValueError) as error:
        raise FisherMergekitError(f"cannot write {file}: {error}") from error
    finally:
        load_pyplot().close(figure)
