"""The table, the picture and the JSON of made-up scores."""

import io
import json

import pytest
from rich.console import Console

from fisher_mergekit.study import report
from fisher_mergekit.study.evaluate import Score
from fisher_mergekit.study.report import Point, Results, best_share
from fisher_mergekit.study.tasks import Examples, Task


def scores(colours, shapes):
    """Return scores with so many right answers of 10 and of 1000."""
    return {
        "colours": Score(tuple(i < colours for i in range(10))),
        "shapes": Score(tuple(i < shapes for i in range(1000))),
    }


def task(name, labels, count):
    none, some = Examples((), ()), Examples(("x",) * count, (0,) * count)
    return Task(name, labels, none, some, some)


RESULTS = Results(
    tasks=(task("colours", ("red", "blue"), 10), task("shapes", ("a", "b", "c"), 1000)),
    specialists={"colours": scores(9, 400), "shapes": scores(1, 950)},
    merges=[
        Point("linear", 0.5, scores(5, 700)),
        Point("fisher", 0.5, scores(8, 690)),
        Point("fisher", 0.2, scores(7, 900)),
    ],
    frontier=[
        Point(method, share, scores(*right))
        for method, points in {
            "linear": {0: (1, 950), 0.2: (2, 900), 0.5: (7, 700), 1: (9, 400)},
            "fisher": {0: (1, 950), 0.2: (7, 900), 0.5: (8, 690), 1: (9, 400)},
        }.items()
        for share, right in points.items()
    ],
)


def lines():
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report.table(RESULTS))
    rows = (line for line in console.export_text().splitlines() if "│" in line)
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in rows]


@pytest.mark.parametrize(
    "cells",
    [
        ["colours specialist", "", "90.0 ± 9.5", "40.0 ± 1.5", "65.0 ± 4.8"],
        ["shapes specialist", "", "10.0 ± 9.5", "95.0 ± 0.7", "52.5 ± 4.8"],
        ["isotropic merge", "0.5 : 0.5", "50.0 ± 15.8", "70.0 ± 1.4", "60.0 ± 7.9"],
        ["Fisher merge", "0.5 : 0.5", "80.0 ± 12.6", "69.0 ± 1.5", "74.5 ± 6.4"],
        # Three of ten examples are won, one in a hundred is lost.
        ["gain", "", "+30.0 ± 14.5", "-1.0 ± 0.3", "+14.5 ± 7.2"],
        ["isotropic merge", "0.5 : 0.5 *", "50.0 ± 15.8", "70.0 ± 1.4", "60.0 ± 7.9"],
        ["Fisher merge", "0.2 : 0.8 *", "70.0 ± 14.5", "90.0 ± 0.9", "80.0 ± 7.3"],
        ["held-out examples", "", "10", "1,000", ""],
    ],
    ids=lambda cells: f"{cells[0]} {cells[1]}".strip(),
)
def test_the_table_has_a_row_for(cells):
    assert cells in lines()


def test_the_best_lambda_has_the_best_mean_over_tasks():
    assert best_share(RESULTS.frontier, "linear") == 0.5
    assert best_share(RESULTS.frontier, "fisher") == 0.2


def test_of_equally_good_lambdas_the_most_equal_is_taken():
    points = [Point("fisher", share, scores(5, 500)) for share in (0, 0.2, 0.7, 1)]
    assert best_share(points, "fisher") == 0.7


def test_the_picture_is_a_small_png(tmp_path):
    pytest.importorskip("matplotlib")
    report.picture(RESULTS, tmp_path / "picture.png")
    content = (tmp_path / "picture.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) < 200_000


def test_the_json_has_every_number(tmp_path):
    report.write_json(RESULTS, tmp_path / "results.json", seed=3)
    content = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert content["seed"] == 3
    held_out, validation = content["held_out"], content["validation"]
    assert held_out["examples"] == {"colours": 10, "shapes": 1000}
    assert held_out["specialists"]["shapes"]["shapes"]["value"] == 0.95
    assert [merge["lambdas"] for merge in held_out["merges"]] == [[0.5, 0.5]] * 2 + [[0.2, 0.8]]
    assert held_out["gains"]["equal"]["shapes"]["value"] == pytest.approx(-0.01)
    assert len(validation["frontier"]) == 8
