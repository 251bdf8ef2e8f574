"""Reading ahead, so that the disk works while the processor does.

Tensors are mapped into memory, and whoever touches a page that is not there waits for the disk. So
what will be touched is read beforehand, into the system's cache and no further: nothing depends on
it but time, and where a system cannot do it nothing happens.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

BEHIND = 1 << 25
"""Bytes behind a tensor that are read with it: files have tensors in their names' order, in which
they are merged, too."""

ADVISED = 1 << 17
"""Bytes that Linux may read ahead at once; it cuts longer advice down to its own limit."""


@contextlib.contextmanager
def descriptor_of(file: Path) -> Iterator[int]:
    """Open a file to read it: thousands of times, so without what `open` makes around it."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def at_hand(pieces: Mapping[Path, Sequence[tuple[int, int]]]) -> Iterator[None]:
    """Have the system read pieces of files, (offset, size), many at once, and forget them after.

    What is in its cache in single pages splits what is read around it later into single pages, too.
    What was there before is left alone.
    """
    asked = {file: wanted for file, wanted in pieces.items() if _advise(file, wanted, "WILLNEED")}
    yield
    for file, wanted in asked.items():
        _advise(file, wanted, "DONTNEED")


def _advise(file: Path, pieces: Sequence[tuple[int, int]], advice: str) -> bool:
    """Say so of pieces of a file; not, if the last one is to be read but is in memory already."""
    code = getattr(os, f"POSIX_FADV_{advice}", None)
    if code is None:
        return False
    with contextlib.suppress(OSError), descriptor_of(file) as descriptor:
        if advice == "WILLNEED" and _is_cached(descriptor, sum(pieces[-1])):
            return False  # so most likely is the rest, and advice takes time, too
        for offset, size in pieces:
            first = offset - offset % mmap.PAGESIZE  # only whole pages are forgotten
            for start in range(first, offset + size, ADVISED):
                length = min(ADVISED, offset + size - start)
                os.posix_fadvise(descriptor, start, length + -length % mmap.PAGESIZE, code)
        return True
    return False


class Stream:
    """One file whose tensors are taken mostly in order.

    A thread of its own reads what comes next. That is quicker than advice to the system, which
    reads what it is advised to in the smallest pages: they take longer to read, and to map.

    Args:
        file: a file; it is opened only when something is read.
    """

    def __init__(self, file: Path):
        self._file = file
        self._asked = 0

    def ask_for(self, start: int, stop: int) -> None:
        """Have these bytes read and those behind them, half a window at least."""
        begin, end = max(start, self._asked), stop + BEHIND
        if end - begin < BEHIND // 2:
            return
        self._asked = end
        with contextlib.suppress(OSError), descriptor_of(self._file) as descriptor:
            if _is_cached(descriptor, end):
                return
        threading.Thread(target=_pull, args=(self._file, begin, end), daemon=True).start()


def _pull(file: Path, begin: int, end: int) -> None:
    """Read bytes to nowhere: the system keeps them, and this process needs no memory for them."""
    with (
        contextlib.suppress(OSError, AttributeError),
        descriptor_of(file) as source,
        open(os.devnull, "wb") as nowhere,
    ):
        while begin < end:
            done = os.sendfile(nowhere.fileno(), source, begin, end - begin)
            if not done:
                return
            begin += done


def _is_cached(descriptor: int, end: int) -> bool:
    """Whether the system has the last byte before `end`, as far as it tells without reading it."""
    try:
        last = min(end, os.fstat(descriptor).st_size) - 1
        return bool(os.preadv(descriptor, [bytearray(1)], max(0, last), os.RWF_NOWAIT))
    except (AttributeError, OSError):
        return False
