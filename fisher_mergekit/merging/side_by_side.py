"""Calls that leave the interpreter to others, such as those that read many megabytes."""

from __future__ import annotations

import contextlib
import functools
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def side_by_side(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Return what calls give, in their order, made by as many threads as torch computes with.

    This thread is one of them: it is awake, and others first have to be woken. It does without
    them where they cannot be had. After an error no call is begun; when none is being made any
    more, the error of the first call that has one is raised.
    """
    waiting = deque(enumerate(calls))
    found: dict[int, T] = {}
    errors: dict[int, Exception] = {}

    def work() -> None:
        with contextlib.suppress(IndexError):
            while True:
                number, call = waiting.popleft()
                try:
                    found[number] = call()
                except Exception as error:
                    errors[number] = error
                    waiting.clear()

    helpers: list[Future[None]] = []
    try:
        with contextlib.suppress(RuntimeError):  # as many threads as there may be
            for _ in range(1, min(torch.get_num_threads(), len(calls))):
                helpers.append(_pool(os.getpid()).submit(work))
        work()
    finally:
        waiting.clear()
        for helper in helpers:
            if not helper.cancel():  # it has begun; others come too late
                helper.exception()
    if errors:
        raise errors[min(errors)]
    return [found[number] for number in range(len(calls))]


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Return this process's threads: a fork of it has to have its own."""
    return ThreadPoolExecutor(thread_name_prefix="side_by_side")
