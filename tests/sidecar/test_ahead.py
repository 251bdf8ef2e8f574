"""Reading ahead: what is asked for, and that nothing but time depends on it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fisher_mergekit.sidecar import ahead

MIB = 1 << 20
PIECES = [(0, 4096), (70_000, 100), (300_000, 200_000), (900_000, 1)]


class Disk:
    """What is read of a file, (begin, end), by threads that do their work when it is their turn."""

    def __init__(self, patch: pytest.MonkeyPatch, tmp_path: Path):
        self.read: list[tuple[int, int]] = []
        self.threads: list[Callable[[], None]] = []
        self.is_cached = False
        self.meanwhile: list[Callable[[], None]] = []
        self._file, self._real = tmp_path / "a", getattr(os, "sendfile", None)
        self._file.touch()
        self.stream = ahead.Stream(self._file)
        patch.setattr(ahead, "_is_cached", lambda *_: self.is_cached)
        patch.setattr(os, "sendfile", self._sendfile, raising=False)
        # Only there: tests have threads, too.
        own = SimpleNamespace(Thread=self._thread, Lock=threading.Lock)
        patch.setattr(ahead, "threading", own)

    def _sendfile(self, out: int, source: int, offset: int, count: int) -> int:
        if not os.path.samestat(os.fstat(source), self._file.stat()):
            return self._real(out, source, offset, count)  # a thread of an earlier test
        assert count <= ahead.AT_ONCE
        last = self.read.pop() if self.read and self.read[-1][1] == offset else (offset, offset)
        self.read.append((last[0], offset + count))
        while self.meanwhile:
            self.meanwhile.pop()()
        return count

    def _thread(self, *, target: Callable[[], None], daemon: bool) -> SimpleNamespace:
        return SimpleNamespace(start=lambda: self.threads.append(target))

    def turn(self) -> None:
        """Let the threads do their work."""
        while self.threads:
            self.threads.pop()()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Disk:
    return Disk(monkeypatch, tmp_path)


@given(taken=st.lists(st.tuples(st.integers(1, 80), st.booleans()), min_size=1, max_size=40))
def test_tensors_in_order_are_read_once_and_half_a_window_before(
    taken: list[tuple[int, bool]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, tmp_path_factory.mktemp("disk"))
        stop = begun = 0
        for size, is_quick in taken:  # a slow disk's thread is still reading when the next is taken
            start, stop = stop, stop + size * MIB
            disk.stream.ask_for(start, stop)
            begun += len(disk.threads) if is_quick else 0
            if is_quick:
                disk.turn()
                begin, end = disk.read[-1]
                assert begin <= start
                assert stop + ahead.BEHIND // 2 <= end <= stop + ahead.BEHIND
            assert len(disk.threads) <= 1
    assert all(last[1] < next_[0] for last, next_ in pairwise(disk.read))
    assert begun <= 1 + stop // (ahead.BEHIND // 2)  # not one by one


def test_a_tensor_far_behind_is_read_without_what_lies_between(disk: Disk) -> None:
    disk.stream.ask_for(0, MIB)
    disk.turn()
    disk.stream.ask_for(900 * MIB, 901 * MIB)
    disk.turn()
    assert disk.read == [(0, MIB + ahead.BEHIND), (900 * MIB, 901 * MIB + ahead.BEHIND)]


def test_a_thread_that_is_overtaken_leaves_out_what_has_been_taken(disk: Disk) -> None:
    disk.meanwhile.append(lambda: disk.stream.ask_for(900 * MIB, 901 * MIB))
    disk.stream.ask_for(0, 10 * MIB)
    disk.threads.pop()()
    assert disk.read == [(0, ahead.AT_ONCE), (900 * MIB, 901 * MIB + ahead.BEHIND)]
    assert not disk.threads


def test_after_an_error_nobody_tries_again(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> int:
        raise OSError(22, "not to this")

    monkeypatch.setattr(os, "sendfile", refuse, raising=False)
    disk.stream.ask_for(0, MIB)
    disk.turn()
    disk.stream.ask_for(MIB, 500 * MIB)
    assert not disk.threads


def test_what_is_in_the_cache_is_not_read(disk: Disk) -> None:
    disk.is_cached = True
    disk.stream.ask_for(0, MIB)
    assert not disk.threads
    disk.is_cached = False
    disk.stream.ask_for(MIB, 100 * MIB)
    disk.turn()
    assert disk.read == [(MIB + ahead.BEHIND, 100 * MIB + ahead.BEHIND)]


def test_where_no_more_threads_can_be_had_it_is_tried_again(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start() -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(ahead.threading, "Thread", lambda **_: SimpleNamespace(start=start))
        disk.stream.ask_for(0, MIB)
    disk.stream.ask_for(MIB, 50 * MIB)
    disk.turn()
    assert disk.read == [(MIB, 50 * MIB + ahead.BEHIND)]


def test_many_threads_that_ask_start_one(disk: Disk) -> None:
    def ask() -> None:
        for i in range(200):
            disk.stream.ask_for(i * 10 * MIB, (i + 1) * 10 * MIB)

    with ThreadPoolExecutor(8) as pool:
        for asked in [pool.submit(ask) for _ in range(8)]:
            asked.result()
    assert len(disk.threads) == 1
    disk.turn()
    ((begin, end),) = disk.read
    assert begin <= 1990 * MIB
    assert 2000 * MIB < end <= 2000 * MIB + ahead.BEHIND


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere sendfile is for sockets")
def test_a_file_that_ends_or_is_not_there_is_nothing_to_tell_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(os.urandom(10_000))
    threads, read, thread, sendfile = [], [], threading.Thread, os.sendfile
    monkeypatch.setattr(
        threading, "Thread", lambda **given: threads.append(thread(**given)) or threads[-1]
    )
    monkeypatch.setattr(ahead, "_is_cached", lambda *_: False)

    def send(out: int, source: int, offset: int, count: int) -> int:
        sent = sendfile(out, source, offset, count)
        if os.path.samestat(os.fstat(source), (tmp_path / "a").stat()):
            read.append(sent)
        return sent

    monkeypatch.setattr(os, "sendfile", send)
    for name in ("a", "b"):
        ahead.Stream(tmp_path / name).ask_for(100, 7000)
    for begun in threads:
        begun.join()
    assert len(threads) == 2
    assert sum(read) == 9_900


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no advice on this system")
@pytest.mark.parametrize("cached", [True, False, None])
def test_small_pieces_are_forgotten_if_they_were_not_there_before(
    cached: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a"
    file.write_bytes(bytes(1_000_000))
    pages: dict[int, set[int]] = {os.POSIX_FADV_WILLNEED: set(), os.POSIX_FADV_DONTNEED: set()}

    def advise(_: int, offset: int, size: int, code: int) -> None:
        assert size > 0  # that would be all of it
        assert offset % 4096 == size % 4096 == 0
        pages[code].update(range(offset // 4096, (offset + size) // 4096))

    def pages_of(pieces: list[tuple[int, int]]) -> set[int]:
        return {byte // 4096 for start, size in pieces for byte in range(start, start + size)}

    monkeypatch.setattr(ahead.mmap, "PAGESIZE", 4096)
    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.setattr(ahead, "_is_cached", lambda *_: cached)
    asked = pages_of([] if cached else PIECES)
    forgotten = pages_of([p for p in PIECES if p[1] < ahead.CRUMB] if cached is False else [])
    with ahead.at_hand({file: PIECES, tmp_path / "b": PIECES}):
        assert (pages[os.POSIX_FADV_WILLNEED], pages[os.POSIX_FADV_DONTNEED]) == (asked, set())
    assert (pages[os.POSIX_FADV_WILLNEED], pages[os.POSIX_FADV_DONTNEED]) == (asked, forgotten)
