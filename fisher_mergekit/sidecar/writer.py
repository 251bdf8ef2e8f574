"""Writing a sidecar so that nothing half-written is ever read as whole."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file

from fisher_mergekit.errors import SidecarError
from fisher_mergekit.sidecar.header import (
    HEADER_NAME,
    METADATA_KEY,
    Header,
    Measurement,
    ModelIdentity,
    PrecisionRecord,
    WeightRecord,
)
from fisher_mergekit.sidecar.location import FOLDER_NAME, files_of
from fisher_mergekit.sidecar.page import PAGE_MARK, PAGE_NAME, render_page
from fisher_mergekit.sidecar.reader import checksum, read_header

SHARD_SIZE = 5_000_000_000
PARTIAL = ".partial"
_OURS = re.compile(r"(README\.md|header\.json.*|\w+(-\d+-of-\d+)?\.safetensors.*)\.partial")
"""What is written here under temporary names, whichever kind it is of."""


def describe(
    tensors: Mapping[str, torch.Tensor], symmetric: Collection[str] = ()
) -> dict[str, PrecisionRecord]:
    """Return the header's record of each stored tensor (CPU, float32 or bfloat16).

    Args:
        symmetric: names of those that are symmetric matrices, `[…, n, n]`.
    """
    return {
        name: PrecisionRecord(
            checksum=checksum(tensor),
            sum_of_squares=sum(float(x.double().square().sum()) for x in _pieces(tensor)),
            asymmetry=_asymmetry(tensor) if name in symmetric else None,
        )
        for name, tensor in tensors.items()
    }


def _pieces(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    return list(tensor.reshape(-1).split(1 << 22))  # in float64, but never all of it at a time


def _asymmetry(factor: torch.Tensor) -> float:
    """Return max |A - Aᵀ| / max |A|."""
    if not factor.numel():
        return 0.0
    largest = max(float(x.abs().max()) for x in _pieces(factor))
    difference = max(float((a - a.mT).abs().max()) for a in factor.reshape(-1, *factor.shape[-2:]))
    return difference / largest if largest else 0.0


def check_writable(folder: Path) -> None:
    """Raise SidecarError, before hours of measuring, if a sidecar cannot be written there."""
    folder = folder.absolute()
    if (folder / "config.json").is_file():
        raise SidecarError(
            f"{folder} is a model's folder, whose own files a sidecar would mix with. Name one "
            f"inside it, such as {folder / FOLDER_NAME} (--out, or `sidecar:` in the recipe)."
        )
    place = next(p for p in (folder, *folder.parents) if p.exists() or p.is_symlink())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise SidecarError(
            f"cannot write the sidecar {folder}: {place} is not a folder that you may write to. "
            "Choose another (--out, or `sidecar:` in the recipe)."
        )


def write_sidecar(
    folder: Path,
    kind: str,
    model: ModelIdentity,
    measurement: Measurement,
    tensors: Mapping[str, torch.Tensor],
    *,
    weights: Mapping[str, WeightRecord] | None = None,
    shard_size: int = SHARD_SIZE,
) -> Header:
    """Write one kind into a sidecar folder; other kinds of the same weights stay.

    All new files are written under temporary names. Only then the old ones are replaced: the kind
    is withdrawn from the header, the files change names, and the new header is written last.

    Args:
        folder: the sidecar folder; made if missing.
        tensors: measured tensors on the CPU, by their names in the checkpoint.
        weights: all of the model's, by which a kind that describes none of this one's is known to
            be of the same; None if there are no more than those that are measured.
        shard_size: largest file in bytes.

    Raises:
        SidecarError: the disk is full, or the folder cannot be written. Nothing partial stays.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder), _partial_files(folder) as partials:
            kept = _other_kinds(folder, kind, weights or measurement.weights)
            header = Header(model=model, kinds={**kept, kind: measurement})
            new = _write_shards(folder, kind, header, tensors, shard_size)
            new[HEADER_NAME] = header.to_json() + "\n"
            if _may_write_page(folder / PAGE_NAME):
                new[PAGE_NAME] = render_page(header)
            for name, content in new.items():
                if content is not None:
                    _write_text(partials(name), content)
            _withdraw(folder, model, kept)
            for stale in files_of(folder, kind):
                stale.unlink()
            # safetensors makes files that only their owner can read; a sidecar is there to share.
            mode = partials(HEADER_NAME).stat().st_mode
            for name in new:
                partials(name).chmod(mode)
            for name in sorted(new, key=lambda name: name == HEADER_NAME):
                os.replace(partials(name), folder / name)
        return header
    except (OSError, SafetensorError) as error:
        raise SidecarError(
            f"cannot write the sidecar {folder}: {error}. Nothing partial was left; make room or "
            "choose another folder (--out, or `sidecar:` in the recipe) and run it again."
        ) from error


def _other_kinds(
    folder: Path, kind: str, weights: Mapping[str, WeightRecord]
) -> dict[str, Measurement]:
    """Return what else the folder holds of the very same weights; kinds describe more or fewer."""
    try:
        header = read_header(folder)
    except SidecarError:
        header = None
    if header is None:
        return {}
    return {
        name: other
        for name, other in header.kinds.items()
        if name != kind and _agree(other.weights, weights)
    }


def _agree(one: Mapping[str, WeightRecord], two: Mapping[str, WeightRecord]) -> bool:
    shared = one.keys() & two.keys()
    return bool(shared) and all(one[name] == two[name] for name in shared)


def _may_write_page(path: Path) -> bool:
    """Return whether there is no page yet, or ours: a model's own README.md is not overwritten."""
    return not path.exists() or PAGE_MARK in path.read_text(encoding="utf-8", errors="replace")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process at a time write here; the lock goes with its process, however that ends."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _partial_files(folder: Path) -> Iterator[Callable[[str], Path]]:
    """Give temporary names inside `folder`, and remove what still bears one at the end."""
    try:
        yield lambda name: folder / (name + PARTIAL)
    finally:
        for leftover in folder.glob("*" + PARTIAL):
            if _OURS.fullmatch(leftover.name):
                leftover.unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()


def _write_shards(
    folder: Path,
    kind: str,
    header: Header,
    tensors: Mapping[str, torch.Tensor],
    shard_size: int,
) -> dict[str, str | None]:
    """Write the tensors; return the new files, with the text of those that are still to write."""
    split = split_torch_state_dict_into_shards(
        dict(tensors),
        filename_pattern=f"{kind}{{suffix}}.safetensors",
        max_shard_size=max(shard_size, 1),
    )
    new: dict[str, str | None] = {}
    # One metadata key only: the library does not keep the order of several, and the same content
    # must give the same bytes.
    own = Header(model=header.model, kinds={kind: header.kinds[kind]})
    metadata = {METADATA_KEY: own.to_json(wall_time=False, indent=None)}
    for file, names in split.filename_to_tensors.items():
        shard = {name: tensors[name].contiguous() for name in names}
        save_file(shard, folder / (file + PARTIAL), None if split.is_sharded else metadata)
        new[file] = None
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        new[f"{kind}.safetensors.index.json"] = json.dumps(index, indent=2, sort_keys=True) + "\n"
    return new


def _withdraw(folder: Path, model: ModelIdentity, kept: dict[str, Measurement]) -> None:
    """Take the kind out of the present header, so that a crash from here on reads as partial."""
    path = folder / HEADER_NAME
    if not path.exists():
        return
    if kept:
        partial = folder / (HEADER_NAME + ".withdrawn" + PARTIAL)
        _write_text(partial, Header(model=model, kinds=kept).to_json() + "\n")
        os.replace(partial, path)
    else:
        path.unlink()


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
