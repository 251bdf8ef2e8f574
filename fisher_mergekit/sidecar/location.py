"""Where a model's sidecar is, when the recipe does not say."""

from __future__ import annotations

import os
import re
from pathlib import Path

FOLDER_NAME = "sidecar"


def cache_home() -> Path:
    """Return the user's cache for sidecars of models that are not local folders.

    `FISHER_MERGEKIT_HOME` overrides it; otherwise it follows `XDG_CACHE_HOME`.
    """
    home = os.environ.get("FISHER_MERGEKIT_HOME")
    if home:
        return Path(home)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fisher_mergekit"


def writing_place(reference: str, revision: str | None = None) -> Path:
    """Return where a model's sidecar is written: in its own folder, or the user's cache.

    Args:
        reference: a local folder, or a Hub model's name.
        revision: the Hub model's revision, if one was asked for.
    """
    if Path(reference).is_dir():
        return Path(reference) / FOLDER_NAME
    name = reference if revision is None else f"{reference}@{revision}"
    return cache_home() / re.sub(r"[^\w.@-]+", "--", name)


def reading_place(reference: str, revision: str | None, snapshot: Path) -> Path:
    """Return where a model's sidecar is read from.

    What the user has measured comes first; then what the model's author has published.

    Args:
        reference: a local folder, or a Hub model's name.
        revision: the Hub model's revision, if one was asked for.
        snapshot: the folder of the model's files; of a Hub model, its download.
    """
    own, published = writing_place(reference, revision), snapshot / FOLDER_NAME
    return published if published.is_dir() and not own.is_dir() else own
