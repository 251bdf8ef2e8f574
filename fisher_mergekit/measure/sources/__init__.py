"""Where a precision comes from, one file a source: passes over data, or what an optimizer kept.

Each defines `prepare`, which finds out all that can be wrong before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from fisher_mergekit.measure.job import Job
    from fisher_mergekit.measure.measured import Measured

Progress = Callable[[int, int], Any]
"""Called with the number of examples done in this step, and of all examples."""


class Prepared(Protocol):
    """A job of which everything is read and checked but the model itself.

    Attributes:
        job: what is to be measured.
    """

    @property
    def job(self) -> Job: ...  # noqa: D102

    def measure(self, progress: Progress) -> Measured:
        """Load the model, and measure it.

        Raises:
            FisherMergekitError: what is wrong, where, and what mends it.
        """
        ...
