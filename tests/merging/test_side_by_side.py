"""Calls made by several threads give what they give one after the other."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator

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
def test_an_error_is_raised_when_all_calls_have_ended(threads: int, bad: int) -> None:
    running: list[int] = []

    def call(number: int) -> Callable[[], None]:
        def made() -> None:
            running.append(number)
            if number == bad:
                running.remove(number)
                raise ValueError(f"number {number}")
            threading.Event().wait(0.01)
            running.remove(number)

        return made

    with pytest.raises(ValueError, match=f"number {bad}"):
        side_by_side([call(number) for number in range(8)])
    assert running == []


def _in_a_fork(pipe) -> None:
    pipe.send(side_by_side([lambda: 1, lambda: 2, lambda: 3]))


def test_a_forked_process_has_threads_of_its_own() -> None:
    side_by_side([lambda: 0] * 4)  # this process has some now, and the fork has not
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_in_a_fork, args=(theirs,))
    process.start()
    try:
        assert ours.poll(60)
        assert ours.recv() == [1, 2, 3]
    finally:
        process.kill()
        process.join()
