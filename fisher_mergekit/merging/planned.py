"""What planning has opened or built, for the tasks of the same merge.

It is kept until the next merge is planned: a process that merges all day, such as an evolution's,
does not hold the files of all its merges.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_everything: list[Planned[Any]] = []


def forget() -> None:
    """Forget what was made for other merges; their tasks that are still to run make it again."""
    for planned in _everything:
        planned.made.clear()


class Planned(Generic[T]):
    """Things that are made from hashable arguments, and kept by them.

    Planning makes each anew, as the disk has it now; the tasks get what was checked then. A task
    that runs in a process that did not plan makes its own.

    Args:
        make: what makes one.

    Attributes:
        made: all of this merge.
    """

    def __init__(self, make: Callable[..., T]):
        self._make = make
        self.made: dict[tuple[Any, ...], T] = {}
        _everything.append(self)

    def anew(self, *key: Any) -> T:
        """Make it, whatever was made before."""
        return self.keep(self._make(*key), *key)

    def keep(self, made: T, *key: Any) -> T:
        """Keep what somebody else has made."""
        self.made[key] = made
        return made

    def again(self, *key: Any) -> T:
        """Return what was made last."""
        return self.made[key] if key in self.made else self.anew(*key)
