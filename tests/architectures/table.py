"""Check every architecture and print docs/architectures.md: `python tests/architectures/table.py`.

python tests/architectures/table.py > docs/architectures.md
"""

from __future__ import annotations

import logging
import math
import re
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from architectures import zoo
from architectures.check import TOLERANCE, Report, check

DOCUMENT = Path(__file__).parents[2] / "docs" / "architectures.md"

TEXT = """\
# Architectures

Each architecture of mergekit's own list (the files in its `_data/architectures`), and some that
mergekit infers from the model's class. Of each, two tiny models of the real transformers class,
with every parameter random, were

1. measured, and compared with plain autograd on one example at a time, for all parameters, in
   float64,
2. measured for its factors of linear layers (`gram` and `kfac`, in the same pass; `gram` alone
   gives the same), and compared, in float64, with what each matrix in the files multiplies, be it
   a layer, an expert, a router or a part of a fused projection,
3. written, and read back under the names of the checkpoint files, however transformers lays them
   out,
4. merged by `mergekit-yaml`, and compared with Σ λ F θ / Σ λ F by hand,
5. loaded by transformers again.

*Measured* is the largest relative error of any tensor, up to the next power of ten; above 1e-5
the tests fail. The models run in float32, whose own plain autograd is off by up to 5e-6. *One at
a time* names the parameters that no fast rule covers: they are measured by plain autograd on
single examples, as exactly, but slowly. *Factors* is the largest relative error of a factor; a
remark says which matrices have none, and where a batch has to be one example. Tables of relative
positions have none either. What mergekit cannot merge, it cannot merge by its own
`linear` either.

This page is what `python tests/architectures/table.py > docs/architectures.md` printed with
transformers {transformers}, mergekit {mergekit} and torch {torch}; a test holds every line of it.

"""

COLUMNS = ("mergekit's file", "class", "measured", "one at a time", "factors", "merged", "remark")


def row(entry: zoo.Entry, report: Report | None) -> tuple[str, ...]:
    """Return an architecture's row; `report` is None if transformers has no model of it."""
    first = (entry.file.removesuffix(".json") or "inferred", entry.architecture)
    if report is None:
        return (*first, "–", "", "–", "–", str(entry.absent))
    if report.error is None:
        assert entry.architecture in zoo.BODIES, report.refusal
        return (*first, "no", "", "no", "no", "no head, so no p(y\\|x): see the ones with a head")
    assert report.factors is not None
    remarks = [zoo.REMARKS.get(entry.architecture, "")]
    if report.factors.undescribed:
        remarks.append(f"no factors of {_short(report.factors.undescribed)}")
    if report.alone:
        remarks.append("`kfac` one example at a time")
    if not report.is_merged:
        remarks.append(zoo.UNMERGED[entry.architecture][0])
    return (
        *first,
        _digits(report.error),
        _short(report.loose),
        _digits(report.factors.error),
        "yes" if report.is_merged else "not by mergekit",
        "; ".join(filter(None, remarks)),
    )


def _digits(error: float) -> str:
    return f"1e{math.ceil(math.log10(error))}"


def _short(names: Iterable[str]) -> str:
    """Return parameters' names, those of all layers once."""
    patterns = sorted({re.sub(r"\.\d+\.", ".N.", name) for name in names})
    shown = ", ".join(f"`{pattern}`" for pattern in patterns[:2])
    return f"{shown} and {len(patterns) - 2} more" if len(patterns) > 2 else shown


def line(cells: tuple[str, ...]) -> str:
    """Return one line of the table."""
    return f"| {' | '.join(cells)} |"


def lines() -> Iterator[str]:
    """Check one architecture after the other, and yield its line."""
    yield line(COLUMNS)
    yield line(("---",) * len(COLUMNS))
    for entry in zoo.entries():
        if entry.absent:
            yield line(row(entry, None))
            continue
        with tempfile.TemporaryDirectory() as folder:
            yield line(row(entry, check(entry.architecture, Path(folder))))


def written() -> dict[tuple[str, str], tuple[str, ...]]:
    """Return the rows of the document, by file and class."""
    rows = {}
    for text in DOCUMENT.read_text(encoding="utf-8").splitlines():
        if text.startswith("| "):
            cells = tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", text)[1:-1])
            if cells != COLUMNS and set(cells[0]) != {"-"}:
                rows[cells[:2]] = cells
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    transformers.logging.set_verbosity_error()
    assert TOLERANCE == 1e-5
    print(
        TEXT.format(
            transformers=transformers.__version__,
            mergekit=version("mergekit"),
            torch=torch.__version__.partition("+")[0],
        ),
        end="",
    )
    for text in lines():
        print(text, flush=True)
