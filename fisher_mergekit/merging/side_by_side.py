"""Calls that leave the interpreter to others, such as those that read many megabytes."""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def side_by_side(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Return what calls give, in their order, made by as many threads as torch computes with.

    This thread is one of them: it is awake, and others first have to be woken. The first error is
    raised when no call is being made any more.
    """
    waiting = deque(enumerate(calls))
    found: dict[int, T] = {}

    def work() -> None:
        while True:
            try:
                number, call = waiting.popleft()
            except IndexError:
                return
            found[number] = call()

    threads = min(torch.get_num_threads(), len(calls))
    helpers = [_pool(os.getpid()).submit(work) for _ in range(1, threads)]
    try:
        work()
    except BaseException:
        waiting.clear()
        raise
    finally:
        errors = [error for helper in helpers if (error := _end(helper))]
    if errors:
        raise errors[0]
    return [found[number] for number in range(len(calls))]


def _end(helper: Any) -> BaseException | None:
    """Wait for a helper, unless it has not begun, and so comes too late; return its error."""
    return None if helper.cancel() else helper.exception()


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Return this process's threads: one that it was forked from keeps its own."""
    return ThreadPoolExecutor(thread_name_prefix="side_by_side")
