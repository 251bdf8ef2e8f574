"""Commands in messages, so that a shell takes them as they are printed."""

from __future__ import annotations

import shlex
from collections.abc import Mapping


def word(value: object) -> str:
    """Return one word of a command."""
    return shlex.quote(str(value))


def flags(given: Mapping[str, object]) -> str:
    """Return the flags that are given, each with a blank before it; True has no value."""
    return "".join(
        f" {flag}" if value is True else f" {flag} {word(value)}"
        for flag, value in given.items()
        if value
    )
