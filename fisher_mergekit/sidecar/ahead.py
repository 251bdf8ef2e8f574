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

BEHIND = 1 << 26
"""Bytes behind a tensor that are read with it: files have tensors in their names' order, in which
they are merged, too."""
AT_ONCE = 1 << 23
"""Bytes read in one step; between two steps the thread looks for new requests."""
ADVISED = 1 << 17
"""Bytes that Linux may read ahead at once; it cuts longer advice down to its own limit."""
CRUMB = 1 << 16
"""Bytes below which a piece is better forgotten than kept in the system's cache."""


@contextlib.contextmanager
def descriptor_of(file: Path) -> Iterator[int]:
    """Open a file to read it: thousands of times, so without what `open` makes around it."""
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """Read bytes of an open file that nobody else uses, also on Windows, which has no `pread`."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, offset)
    os.lseek(descriptor, offset, os.SEEK_SET)
    return os.read(descriptor, size)


@contextlib.contextmanager
def at_hand(pieces: Mapping[Path, Sequence[tuple[int, int]]]) -> Iterator[None]:
    """Have the system read pieces of files, (offset, size), at once; it forgets small ones after.

    What is in its cache in single pages splits what is read around it later into single pages, too.
    Files whose last piece is in the cache are left alone: so most likely are the others, and advice
    takes time, too.
    """
    fresh: dict[Path, list[tuple[int, int]]] = {}
    for file, wanted in pieces.items():
        cached = _is_cached(file, sum(wanted[-1]))
        if not cached:
            _advise(file, wanted, "WILLNEED")
        if cached is False:
            fresh[file] = [(offset, size) for offset, size in wanted if size < CRUMB]
    try:
        yield
    finally:
        for file, small in fresh.items():
            _advise(file, small, "DONTNEED")


def _advise(file: Path, pieces: Sequence[tuple[int, int]], advice: str) -> None:
    """Give Linux advice on pieces of a file, in whole pages: parts of one are not forgotten."""
    code = getattr(os, f"POSIX_FADV_{advice}", None)
    if code is None:
        return
    with contextlib.suppress(OSError), descriptor_of(file) as descriptor:
        for offset, size in pieces:
            first = offset - offset % mmap.PAGESIZE
            for start in range(first, offset + size, ADVISED):
                length = min(ADVISED, offset + size - start)
                os.posix_fadvise(descriptor, start, length + -length % mmap.PAGESIZE, code)


class Stream:
    """One file whose tensors are taken mostly in order, from any thread.

    A thread of its own reads what comes next, until it is as far as it was asked to be. That is
    quicker than advice to the system, which reads what it is advised to in the smallest pages: they
    take longer to read, and to map.

    Args:
        file: a file; it is opened only when something is read.
    """

    def __init__(self, file: Path):
        self._file = file
        self._lock = threading.Lock()
        self._begin = self._end = 0  # what is still to be read
        self._is_reading = False

    def ask_for(self, start: int, stop: int) -> None:
        """Have these bytes read, and up to `BEHIND` more; asked for is at least half of that."""
        with self._lock:
            end = stop + BEHIND
            if end - max(start, self._end) < BEHIND // 2:
                return
            self._begin, self._end = max(start, self._begin), end
            if self._is_reading:
                return
            if _is_cached(self._file, end):
                self._begin = end
                return
            self._is_reading = True
        try:
            threading.Thread(target=self._read, daemon=True).start()
        except RuntimeError:  # as many threads as there may be
            self._is_reading = False

    def _read(self) -> None:
        """Read to nowhere: the system keeps it, and this process needs no memory for it.

        What a short answer leaves out is read when it is touched. After an error this counts as
        reading still, so that nobody tries again where the system cannot do it.
        """
        with contextlib.suppress(OSError, AttributeError), descriptor_of(self._file) as source:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            try:
                while piece := self._next():
                    os.sendfile(nowhere, source, *piece)
            finally:
                os.close(nowhere)

    def _next(self) -> tuple[int, int] | None:
        """Take the offset and the size of what to read next; None once there is nothing."""
        with self._lock:
            offset, size = self._begin, min(AT_ONCE, self._end - self._begin)
            self._is_reading = size > 0
            self._begin += size
        return (offset, size) if size > 0 else None


def _is_cached(file: Path, end: int) -> bool | None:
    """Whether the system has the last byte before `end`, or of the file; None if it does not tell.

    The question does not wait for the disk, but the system may begin to read that page.
    """
    try:
        with descriptor_of(file) as descriptor:
            last = min(end, os.fstat(descriptor).st_size) - 1
            return bool(os.preadv(descriptor, [bytearray(1)], max(0, last), os.RWF_NOWAIT))
    except BlockingIOError:
        return False
    except (AttributeError, OSError):
        return None
