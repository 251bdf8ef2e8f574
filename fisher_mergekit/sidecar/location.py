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


def default_location(
    reference: str, revision: str | None = None, *, snapshot: Path | None = None
) -> Path:
    """Return `sidecar/` in the model's own folder, or the user's cache for a Hub model without one.

    Args:
        reference: a local folder, or a Hub model's name.
        revision: the Hub model's revision, if one was asked for.
        snapshot: where the Hub model's files were downloaded to: its author may have published a
            sidecar among them.
    """
    if Path(reference).is_dir():
        return Path(reference) / FOLDER_NAME
    if snapshot is not None and (snapshot / FOLDER_NAME).is_dir():
        return snapshot / FOLDER_NAME
    name = reference if revision is None else f"{reference}@{revision}"
    return cache_home() / re.sub(r"[^\w.@-]+", "--", name)
