"""Reading ahead: what is asked for, and that nothing but time depends on it."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fisher_mergekit.sidecar import ahead

MIB = 1 << 20
PIECES = [(0, 4096), (70_000, 100), (300_000, 200_000), (900_000, 1)]


class Now:
    """A thread that does its work as it is started."""

    def __init__(self, target, args, daemon):  # type: ignore[no-untyped-def]
        self.start = lambda: target(*args)


def asked_for(tensors: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Take tensors of one file, (start, stop); return all that has been asked for after each."""
    asked: list[tuple[int, int]] = []
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ahead, "_is_cached", lambda *_: False)
        patch.setattr(ahead, "_pull", lambda _, begin, end: asked.append((begin, end)))
        patch.setattr(threading, "Thread", Now)
        stream = ahead.Stream(Path("a"))
        for start, stop in tensors:
            stream.ask_for(start, stop)
            found.append(list(asked))
    return found


@given(sizes=st.lists(st.integers(1, 80), min_size=1, max_size=40))
def test_tensors_in_order_are_asked_for_once_and_half_a_window_before(sizes: list[int]) -> None:
    stops = [sum(sizes[: i + 1]) * MIB for i in range(len(sizes))]
    asked = asked_for(list(zip([0, *stops], stops, strict=False)))
    for (*_, (_, end)), stop in zip(asked, stops, strict=True):
        assert stop + ahead.BEHIND // 2 <= end <= stop + ahead.BEHIND
    begins, ends = zip(*asked[-1], strict=True)
    assert begins == (0, *ends[:-1])
    assert len(begins) <= 1 + stops[-1] // (ahead.BEHIND // 2)  # not one by one


def test_a_tensor_far_behind_is_asked_for_without_what_lies_between() -> None:
    asked = asked_for([(0, MIB), (900 * MIB, 901 * MIB)])
    assert asked[-1] == [*asked[0], (900 * MIB, 901 * MIB + ahead.BEHIND)]


def test_where_no_more_threads_can_be_had_nothing_is_read_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    ahead.Stream(tmp_path / "a").ask_for(0, 10)


@pytest.mark.skipif(not hasattr(os, "sendfile"), reason="it is done by sendfile")
def test_all_bytes_are_read_and_a_file_that_ends_or_is_not_there_is_nothing_to_tell_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a"
    file.write_bytes(os.urandom(10_000))
    read = []

    def sendfile(out: int, source: int, offset: int, count: int) -> int:
        done = real(out, source, offset, min(count, 1500))  # it may do less than it is asked to
        read.extend(range(offset, offset + done))
        return done

    real = os.sendfile
    monkeypatch.setattr(os, "sendfile", sendfile)
    ahead._pull(file, 100, 7000)
    assert read == list(range(100, 7000))
    read.clear()
    ahead._pull(file, 100, 1 << 40)
    assert read == list(range(100, 10_000))
    ahead._pull(tmp_path / "b", 0, 10)


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
