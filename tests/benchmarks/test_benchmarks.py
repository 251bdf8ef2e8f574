"""The benchmarks run, and what they say of their own results is so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "measuring.py"


def table(*arguments: str) -> str:
    command = [sys.executable, str(SCRIPT), "--smoke", "--rounds", "1", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def cells(text: str, label: str) -> list[list[str]]:
    """Return the cells of all lines of that label: aim (if any), step, and the other ways."""
    return [line.split()[1:] for line in text.splitlines() if line.strip().startswith(label + " ")]


@pytest.mark.slow
def test_every_way_is_timed_and_right_or_says_why_not() -> None:
    text = table("--no-memory")
    titles = ["Fisher", "empirical", "loop", "Kronfluence", "Opacus", "NNGeometry"]
    covered, errors = cells(text, "covered (%)"), cells(text, "error")
    assert len(covered) == len(errors) == 4
    for row in covered:
        assert row[1:5] == ["100", "-", "100.0", row[4]]  # (%), aim, step, Fisher
    models = re.findall(r"^(tiny \w+), 3 x", text, re.MULTILINE)
    assert models == ["tiny BERT", "tiny Llama", "tiny Mixtral"]
    compared = [row for row in covered if row[4] != "-"]
    assert len(compared) == 3
    for model, row in zip(models, compared, strict=True):
        for title, cell in zip(titles, row[3:], strict=True):
            assert cell != "-" or f"* {title}, {model}: " in text
    for row in errors:
        if row[2] != "-":
            assert float(row[2]) < 1e-5  # empirical, against the loop


@pytest.mark.slow
def test_peak_memory_of_a_step_and_of_measuring() -> None:
    text = table("--only", "tiny BERT, 3 x", "--ways", "Fisher", "loop")
    (line,) = [x for x in text.splitlines() if x.strip().startswith("peak memory")]
    aim, *found = (int(cell) for cell in line.split()[3:])
    assert len(found) == 3
    assert 0 < found[0] <= aim < 1000
    assert all(0 < x < 1000 for x in found)
