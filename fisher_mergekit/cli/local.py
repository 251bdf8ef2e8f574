"""The local files of what a recipe names: downloaded, or made, if need be."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from mergekit.common import ModelPath, ModelReference

from fisher_mergekit.errors import CheckpointError, RecipeError
from fisher_mergekit.measure.adapter import base_of, is_adapter
from fisher_mergekit.sidecar.checkpoint import Checkpoint
from fisher_mergekit.sidecar.location import reading_places, writing_place

_READING_FILES = (
    "tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.txt",
    "preprocessor_config.json",
)  # fmt: skip

_MERGED = ("*.json", "*.safetensors", "tokenizer.model")
"""What mergekit downloads of a model; what is in its folder `sidecar/` too."""
_READ = ("*.txt", "*.model", "*.jinja")
"""What else turns data into inputs: vocabularies of older tokenizers, chat templates."""
_CODE = ("*.py",)


@dataclass(frozen=True)
class Storage:
    """Where things are kept, by mergekit's flags of these names.

    Attributes:
        transformers_cache: downloads.
        lora_merge_cache: models that an adapter has been merged into.
        lora_merge_dtype: to load the model in before that; None leaves it to transformers.
    """

    transformers_cache: str | None = None
    lora_merge_cache: str | None = None
    lora_merge_dtype: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class LocalModel:
    """The folders that belong to one model of a recipe.

    Attributes:
        folder: the tensors that are measured.
        tokenizer: the tokenizer, or what else turns data into inputs: the adapter's own if it has
            one, and else its model's.
        base: if `folder` is an adapter alone, the model that it was trained on.
        present: where its sidecars are read from.
        out: where its sidecar is written to.
    """

    folder: Path
    tokenizer: Path
    base: Path | None
    present: tuple[Path, ...]
    out: Path


def find(reference: ModelReference, storage: Storage) -> LocalModel:
    """Find a model, a model with an adapter merged into it, or an adapter alone.

    Raises:
        RecipeError: it is neither here nor can it be downloaded or made.
    """
    path = reference.model
    first = _folder(path, storage)
    if reference.lora is not None:
        adapter = _folder(reference.lora, storage)
        owner = (reference.lora.path, reference.lora.revision)
        return LocalModel(
            folder=_merged(reference, storage),
            tokenizer=adapter if _can_read(adapter) else first,
            base=None,
            present=reading_places(*owner, adapter, str(path)),
            out=writing_place(*owner, str(path)),
        )
    base = None
    if is_adapter(first):
        name, revision = base_of(first)
        base = _folder(ModelPath(path=name, revision=revision), storage)
    return LocalModel(
        folder=first,
        tokenizer=base if base is not None and not _can_read(first) else first,
        base=base,
        present=reading_places(path.path, path.revision, first),
        out=writing_place(path.path, path.revision),
    )


def sidecar_places(reference: ModelReference) -> tuple[Path, ...]:
    """Return where a model's sidecars may be here; nothing is downloaded or made for it."""
    owner = reference.lora or reference.model
    base = None if reference.lora is None else str(reference.model)
    snapshot = Path(owner.path)
    if not snapshot.exists():
        with contextlib.suppress(Exception):  # it has not been downloaded
            found = snapshot_download(owner.path, revision=owner.revision, local_files_only=True)
            snapshot = Path(found)
    return reading_places(owner.path, owner.revision, snapshot, base)


def _folder(path: ModelPath, storage: Storage) -> Path:
    if Path(path.path).is_file():
        raise RecipeError(f"{path} is a file; name the model's folder.")
    if Path(path.path).exists():
        return Path(path.path)
    patterns = [*_MERGED, *_READ, *(_CODE if storage.trust_remote_code else ())]
    place: dict[str, Any] = {"revision": path.revision, "cache_dir": storage.transformers_cache}
    try:
        try:
            return Path(snapshot_download(path.path, allow_patterns=patterns, **place))
        except LocalEntryNotFoundError:  # offline, and in the cache is what mergekit has downloaded
            return Path(snapshot_download(path.path, allow_patterns=list(_MERGED), **place))
    except HFValidationError:  # whose rules for names are no help to who mistook a folder
        raise RecipeError(
            f"{path} is neither a local folder nor a model that can be downloaded: {Path.cwd()}, "
            "to which paths are relative, has no such folder, and a model's name on the Hub is "
            "written ORG/NAME."
        ) from None
    except Exception as error:  # the hub client raises a wide family, offline included
        raise RecipeError(
            f"{path} is neither a local folder nor a model that can be downloaded: {error}"
        ) from None


def _merged(reference: ModelReference, storage: Storage) -> Path:
    """Let mergekit merge the adapter into its model, and return the folder of the result.

    The result has to be the one that mergekit-yaml will merge, so it is mergekit that makes it,
    where mergekit-yaml will find it: made anew with other threads it could differ in a last bit.
    """
    cache = storage.lora_merge_cache
    if cache is None:
        raise RecipeError(
            f"{reference} is a model and an adapter, which mergekit merges into a folder. Name one "
            "with --lora-merge-cache DIR, here and for mergekit-yaml."
        )
    assert reference.lora is not None
    made = Path(cache) / f"{reference.model._unique_id()}_{reference.lora._unique_id()}"
    was_there = made.exists()
    try:
        merged = reference.merged(
            cache_dir=cache,
            trust_remote_code=storage.trust_remote_code,
            lora_merge_dtype=storage.lora_merge_dtype,
        )
    except Exception as error:  # peft's and transformers' own errors are of every class
        if not was_there:  # mergekit would take it for the result
            shutil.rmtree(made, ignore_errors=True)
        raise RecipeError(f"mergekit cannot merge {reference}: {error}") from None
    folder = Path(merged.model.path)
    try:
        Checkpoint(folder)
    except CheckpointError as error:
        raise RecipeError(
            f"{error.message} It is what mergekit left of an interrupted merge of {reference}; "
            "remove that folder, and it is made anew."
        ) from None
    return folder


def _can_read(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _READING_FILES)
