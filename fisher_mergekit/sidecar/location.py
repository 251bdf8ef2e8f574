"""Where a model's sidecar is, when the recipe does not say."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
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


def folder_name(base: str | None = None) -> str:
    """Return the name of a sidecar's folder in its model's own folder, or its adapter's.

    Args:
        base: the model that the adapter is put on.
    """
    return FOLDER_NAME if base is None else f"{FOLDER_NAME}-{_short_name(base)}"


def writing_place(reference: str, revision: str | None = None, base: str | None = None) -> Path:
    """Return where a model's sidecar is written: in its own folder, or the user's cache.

    The statistics of a model with an adapter are those of their sum, and belong to the pair. They
    stand in the adapter's folder, under the base's name: an adapter can be put on several, and
    `sidecar/` there is for the adapter's own parameters.

    Args:
        reference: a local folder, or a Hub model's name; the adapter's, where there is one.
        revision: the Hub model's revision, if one was asked for.
        base: the model that the adapter is put on.
    """
    if Path(reference).is_dir():
        return Path(reference) / folder_name(base)
    name = reference if revision is None else f"{reference}@{revision}"
    return cache_home() / (_one_word(name) + ("" if base is None else f"+{_short_name(base)}"))


def reading_places(
    reference: str, revision: str | None, snapshot: Path, base: str | None = None
) -> tuple[Path, ...]:
    """Return where a model's sidecars may be.

    What the user has measured comes first; then what the model's author has published.

    Args:
        reference: a local folder, or a Hub model's name; the adapter's, where there is one.
        revision: the Hub model's revision, if one was asked for.
        snapshot: the folder of its files; of a Hub model, its download.
        base: the model that the adapter is put on.
    """
    own = writing_place(reference, revision, base)
    return tuple(dict.fromkeys((own, writing_place(str(snapshot), base=base))))


def holding(places: Sequence[Path], kind: str) -> Path:
    """Return the first place that has files of a kind, or simply the first."""
    return next((place for place in places if files_of(place, kind)), places[0])


def files_of(folder: Path, kind: str) -> list[Path]:
    """Return the files of a kind in a sidecar folder: one, or shards and their index.

    A file of any other name, such as a copy that somebody keeps there, is none of them.
    """
    pattern = re.compile(rf"{re.escape(kind)}(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
    return [path for path in folder.glob(f"{kind}*") if pattern.fullmatch(path.name)]


def _short_name(model: str) -> str:
    return Path(model).resolve().name if Path(model).is_dir() else _one_word(model)


def _one_word(name: str) -> str:
    return re.sub(r"[^\w.@-]+", "--", name)
