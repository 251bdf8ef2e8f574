"""Reading ahead: what is asked for, and that nothing but time depends on it."""

from __future__ import annotations

import itertools
import os
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fisher_mergekit.sidecar import ahead

MIB = 1 << 20


def asked_for(tensors: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Take tensors of one file, (start, stop); return what had been asked for after each."""
    asked: list[tuple[int, int]] = []
    with monkeypatch.context() as patch:
        patch.setattr(ahead, "_is_cached", lambda *_: False)
        patch.setattr(ahead, "_pull", lambda _, begin, end: asked.append((begin, end)))
        patch.setattr(threading, "Thread", Now)
        stream = ahead.Stream(Path(os.devnull))
        ends = []
        for start, stop in tensors:
            stream.ask_for(start, stop)
            ends.append([end for _, end in asked])
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(asked))
    return ends


class Now:
    """A thread that does its work as it is started."""

    def __init__(self, target, args, daemon):  # type: ignore[no-untyped-def]
        self.start = lambda: target(*args)


@given(sizes=st.lists(st.integers(1, 80), min_size=1, max_size=40))
def test_whoever_takes_tensors_in_order_is_half_a_window_behind(sizes: list[int]) -> None:
    stops = [sum(sizes[: i + 1]) * MIB for i in range(len(sizes))]
    tensors = list(zip([0, *stops], stops, strict=False))
    with pytest.MonkeyPatch.context() as patch:
        ends = asked_for(tensors, patch)  # no byte twice, which it asserts
    for (_, stop), end in zip(tensors, ends, strict=True):
        assert stop + ahead.BEHIND // 2 <= max(end) <= stop + ahead.BEHIND
    assert len(ends[-1]) <= 1 + sum(sizes) * MIB // (ahead.BEHIND // 2)  # not one by one


def test_a_tensor_far_behind_is_asked_for_without_what_lies_between(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (first, second) = asked_for([(0, MIB), (900 * MIB, 901 * MIB)], monkeypatch)
    assert second == [*first, 901 * MIB + ahead.BEHIND]


def test_files_that_end_or_are_not_there_are_nothing_to_tell_of(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"0" * 10_000)
    ahead._pull(file, 0, 1 << 40)
    ahead._pull(tmp_path / "b", 0, 10)
    ahead.Stream(tmp_path / "b").ask_for(0, 10)
    with ahead.at_hand({file: [(5_000, 1 << 30)], tmp_path / "b": [(0, 10)]}):
        assert file.read_bytes() == b"0" * 10_000


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="nothing tells what is in memory")
def test_what_is_looked_at_in_passing_does_not_stay_but_what_was_there_does(tmp_path: Path) -> None:
    size = 4 * MIB
    file = tmp_path / "a"
    file.write_bytes(os.urandom(size))
    pieces = [(place * 1000 * 1000, 100) for place in range(4)]

    def cached() -> list[bool]:
        with ahead.descriptor_of(file) as descriptor:
            return [ahead._is_cached(descriptor, start + length) for start, length in pieces]

    with ahead.descriptor_of(file) as descriptor:
        os.fsync(descriptor)
        if not all(cached()):
            pytest.skip("this file system does not tell what is in memory")
        with ahead.at_hand({file: pieces}):
            pass
        assert all(cached())
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        if any(cached()):
            pytest.skip("this file system does not forget")
        with ahead.at_hand({file: pieces}):
            until = time.monotonic() + 20
            while not all(cached()) and time.monotonic() < until:
                time.sleep(0.01)
            assert all(cached())
        assert not any(cached())
        ahead._pull(file, 0, size)
        assert all(cached())
