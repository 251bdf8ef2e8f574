"""The benchmarks run, and what they say of their own results is so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks import sizes

SCRIPT = Path(__file__).parent / "measuring.py"


def table(*arguments: str) -> str:
    command = [sys.executable, str(SCRIPT), "--smoke", "--rounds", "1", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def cells(text: str, label: str) -> list[dict[str, str]]:
    """Return the cells of all lines of that label, by the titles of their columns."""
    titles = next(line for line in text.splitlines() if line.split()[:1] == ["aim"])
    ends = {m.group(): m.end() for m in re.finditer(r"\S+", titles)}
    starts = dict(zip(ends, [len(label) + 2, *ends.values()], strict=False))
    return [
        {title: line[starts[title] : end].strip() for title, end in ends.items()}
        for line in text.splitlines()
        if line.strip().startswith(label)
    ]


@pytest.mark.slow
def test_every_way_is_timed_and_right_or_says_why_not() -> None:
    text = table("--no-memory")
    names = re.findall(r"^(tiny \w+)(.*), 3 x", text, re.MULTILINE)
    assert names == [
        ("tiny BERT", ""),
        ("tiny BERT", ", 3 classes"),
        ("tiny Llama", ""),
        ("tiny Mixtral", ""),
    ]
    compared = iter(cells(text, "error"))
    rows = zip(names, cells(text, "time / step"), cells(text, "covered (%)"), strict=True)
    for (model, classes), times, covered in rows:
        assert times["step"] == "1.00"
        assert float(times["Fisher"]) > 0
        assert covered["Fisher"] == "100.0"
        if classes:
            assert not covered["loop"]
            continue
        errors = next(compared)
        assert covered["empirical"] == covered["loop"] == "100.0"
        assert float(errors["empirical"]) < 1e-5
        for title in ("Kronfluence", "Opacus", "NNGeometry"):
            if times[title] == "-":
                assert f"* {title}, {model}: " in text
            else:
                assert 0 < float(covered[title]) <= 100
                assert float(errors[title]) < 1e-5 or f"* {title}, {model}: " in text


@pytest.mark.slow
def test_peak_memory_of_a_step_and_of_measuring() -> None:
    text = table("--only", "tiny BERT, 3 x", "--ways", "Fisher", "loop")
    (found,) = cells(text, "peak memory (MiB)")
    assert list(found) == ["aim", "step", "Fisher", "loop"]
    assert 0 < int(found["step"]) <= int(found["aim"]) < 1000
    assert all(0 < int(cell) < 1000 for cell in found.values())


@pytest.mark.slow
def test_the_table_of_kinds_is_printed() -> None:
    command = [sys.executable, str(SCRIPT.parent / "kinds.py"), "--smoke", "--rounds", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    times = [line.split()[3:] for line in done.stdout.splitlines() if "time / forward" in line]
    assert len(times) == 2
    for limit, forward, *others in times:
        assert 1 < float(limit) < 3
        assert forward == "1.00"
        assert all(float(ratio) > 0 for ratio in others)
    assert "Llama-3.1-8B's shape" in done.stdout
    assert re.search(r"32\.1 \(4\.0\) +32\.8 \(4\.1\) +92\.2 \(11\.5\)", done.stdout)


def script(name: str, *arguments: str) -> str:
    command = [sys.executable, str(SCRIPT.parent / name), "--smoke", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_table_of_merges_by_size_is_printed() -> None:
    text = script("sizes.py", "--models", "2", "3", "--rounds", "1", "--cold", "1")
    rows = [line.split() for line in text.splitlines()][-2:]
    assert [row[0] for row in rows] == ["2", "3"]
    for row in rows:
        linear, fisher, ratio, *others, read, _, _, _ = map(float, row[1:])
        # The files are so small that their headers count.
        assert 1.9 < read < 2.2
        assert ratio == pytest.approx(fisher / linear, rel=0.2)
        assert len(others) == 6
        assert all(x > 0 for x in others)
        assert all(0 <= float(mib) < 100 for mib in row[-3:])


def test_cells_of_rounds() -> None:
    """Medians of seconds, the median of ratios, and the ratio of the fastest."""
    walls = {"linear": [1.0, 2.0, 4.0], "fisher": [3.0, 3.0, 8.0]}
    found = {m: [sizes.Merge(w, 10 / w, 0) for w in each] for m, each in walls.items()}
    assert sizes.cells_of(found) == ["2.00", "3.00", "2.00", "3.00"]
    assert sizes.cpu_of(found) == "0.50"
    nothing: dict[str, list[sizes.Merge]] = {"linear": [], "fisher": []}
    assert [*sizes.cells_of(nothing), sizes.cpu_of(nothing)] == [""] * 5


@pytest.mark.slow
def test_the_table_of_merges_by_method_is_printed() -> None:
    text = script("merging.py", "--rounds", "1")
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines()[-4:]}
    assert list(rows) == ["linear", "fisher", "regmean", "mats"]
    gigabytes = [float(cells[4]) for cells in rows.values()]
    assert gigabytes[0] == 8  # two models in float32
    assert gigabytes[1] == 16
    assert gigabytes[1] < gigabytes[3] > gigabytes[2] > gigabytes[0]
    assert all(float(cell) >= 0 for cells in rows.values() for cell in cells)


@pytest.mark.slow
def test_planning_of_80_layers_is_timed() -> None:
    text = script("planning.py", "--rounds", "1")
    assert "80 layers" in text
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines()[-4:]}
    assert list(rows) == ["linear", "fisher", "regmean", "mats"]
    assert all(len(cells) == 4 and all(float(c) > 0 for c in cells) for cells in rows.values())
