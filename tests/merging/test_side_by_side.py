"""Calls made by several threads give what they give one after the other."""

from __future__ import annotations

import functools
import multiprocessing
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fisher_mergekit.merging.side_by_side import side_by_side


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [0, 1, 2, 5, 50])
def test_results_are_in_the_order_of_the_calls(threads: int, count: int) -> None:
    calls = [lambda number=number: number for number in range(count)]
    assert side_by_side(calls) == list(range(count))


def test_as_many_calls_are_made_at_a_time_as_torch_has_threads(threads: int) -> None:
    meeting = threading.Barrier(threads, timeout=30)  # all of them, or nobody passes
    side_by_side([meeting.wait] * (3 * threads))


@pytest.mark.parametrize("bad", [0, 3, 7])
def test_an_error_is_raised_when_no_call_is_being_made(threads: int, bad: int) -> None:
    begun: set[int] = set()
    ended: set[int] = set()

    def made(number: int) -> None:
        begun.add(number)
        try:
            if number == bad:
                raise ValueError(f"number {number}")
            time.sleep(0.01)
        finally:
            ended.add(number)

    with pytest.raises(ValueError, match=f"number {bad}"):
        side_by_side([functools.partial(made, number) for number in range(100)])
    assert begun == ended
    assert len(begun) < 50  # after it none is begun


def test_of_several_errors_the_first_call_s_is_raised(threads: int) -> None:
    def made(number: int) -> None:
        time.sleep(0.02 / (number + 1))  # the later ones are quicker
        raise ValueError(f"number {number}")

    with pytest.raises(ValueError, match="number 0"):
        side_by_side([functools.partial(made, number) for number in range(8)])


def test_where_no_more_threads_can_be_had_one_does_it_all(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def submit(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(ThreadPoolExecutor, "submit", submit)
    assert side_by_side([lambda: 1, lambda: 2, lambda: 3]) == [1, 2, 3]


def _two_meet() -> None:
    """Two threads wait for each other; one alone waits in vain."""
    torch.set_num_threads(2)
    side_by_side([threading.Barrier(2, timeout=20).wait] * 2)


def test_a_forked_process_has_threads_of_its_own() -> None:
    before = torch.get_num_threads()
    _two_meet()  # this process has some now, and the fork has not
    torch.set_num_threads(before)
    process = multiprocessing.get_context("fork").Process(target=_two_meet)
    process.start()
    process.join(60)
    process.kill()
    assert process.exitcode == 0
