"""What planning has opened or built, for the tasks of the same merge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Planned(Generic[T]):
    """Things that are made from hashable arguments, and kept by them.

    Planning makes each anew, as the disk has it now; the tasks get what was checked then. A task
    that runs in a process that did not plan makes its own.

    Args:
        make: what makes one.
    """

    def __init__(self, make: Callable[..., T]):
        self._make = make
        self._made: dict[tuple[Any, ...], T] = {}

    def anew(self, *key: Any) -> T:
        """Make it, whatever was made before."""
        self._made[key] = self._make(*key)
        return self._made[key]

    def again(self, *key: Any) -> T:
        """Return what was made last."""
        return self._made[key] if key in self._made else self.anew(*key)
