"""Safetensors files seen from outside: names, shapes, dtypes and digests, without loading a tensor.

A safetensors file is 8 bytes (little-endian length n), n bytes of JSON that give each tensor's
dtype, shape and byte range, then the bytes. Reading that header ourselves, instead of through the
library, tells a truncated, an empty and a pickle file apart and gives the byte ranges to digest.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from safetensors import safe_open

from fisher_mergekit.errors import CheckpointError
from fisher_mergekit.sidecar import ahead

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "U16": 2, "U32": 4, "U64": 8,
}  # fmt: skip
FLOATING = frozenset({"F64", "F32", "F16", "BF16"})

DIGEST_WHOLE = 1 << 20
DIGEST_BLOCKS = 16
DIGEST_BLOCK = 4096
"""A tensor's digest covers all bytes up to `DIGEST_WHOLE`, and of a larger tensor `DIGEST_BLOCKS`
evenly spaced blocks of `DIGEST_BLOCK` bytes: checking a 70B model must not mean reading it."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: its file, dtype (safetensors spelling), shape and byte range."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def is_floating(self) -> bool:
        """Whether the tensor holds ordinary floating-point numbers (not quantised ones)."""
        return self.dtype in FLOATING

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def digest(self) -> str:
        """Return a digest of dtype, shape and (of large tensors, sampled) bytes."""
        hasher = xxhash.xxh3_128(f"{self.dtype} {list(self.shape)}".encode())
        with ahead.descriptor_of(self.file) as descriptor:
            for offset, size in self.samples():
                hasher.update(ahead.read_at(descriptor, size, offset))
        return hasher.hexdigest()

    def samples(self) -> list[tuple[int, int]]:
        """Return where in the file the bytes of the digest begin, and how many they are."""
        size = self.stop - self.start
        if size <= DIGEST_WHOLE:
            return [(self.start, size)]
        last = size - DIGEST_BLOCK
        steps = DIGEST_BLOCKS - 1
        return [
            (self.start + last * block // steps, DIGEST_BLOCK) for block in range(DIGEST_BLOCKS)
        ]


def samples_at_hand(infos: Iterable[TensorInfo]) -> contextlib.AbstractContextManager[None]:
    """Have the system read what digests are made of, while they are made in this context.

    It reads many pieces at once then. Whoever asks for one after the other waits for each of them.
    """
    pieces: dict[Path, list[tuple[int, int]]] = {}
    for info in infos:
        pieces.setdefault(info.file, []).extend(info.samples())
    return ahead.at_hand(pieces)


def read_tensor_infos(file: Path) -> dict[str, TensorInfo]:
    """Return every tensor of one safetensors file, checked against the file's real size.

    Raises:
        CheckpointError: the file is missing, empty, truncated, a pickle, or not safetensors.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            if size == 0:
                raise CheckpointError(f"{file} is empty (0 bytes).")
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > size - 8:
                # Only an impossible length makes it a pickle: 0x80 can also begin an honest one.
                if prefix[:2] == b"PK" or prefix[:1] == b"\x80":
                    raise CheckpointError(
                        f"{file} is a pickle, not safetensors. Pickles can run code and are not "
                        "read; save it again as safetensors."
                    )
                raise CheckpointError(f"{file} is not a safetensors file, or is cut short.")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        begin = 8 + length
        infos = {
            name: TensorInfo(
                name,
                file,
                entry["dtype"],
                tuple(entry["shape"]),
                begin + entry["data_offsets"][0],
                begin + entry["data_offsets"][1],
            )
            for name, entry in header.items()
        }
    except FileNotFoundError:
        raise CheckpointError(f"{file} does not exist.") from None
    except (
        OSError,
        UnicodeDecodeError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file ({error}).") from error
    end = max((info.stop for info in infos.values()), default=begin)
    if end != size:
        raise CheckpointError(
            f"{file} is truncated or has grown: its header promises {end:,} bytes, it has {size:,}."
        )
    for info in infos.values():
        width = ITEM_BYTES.get(info.dtype)  # a dtype that is not known may be a new one
        if width is not None and info.stop - info.start != info.count * width:
            raise CheckpointError(
                f"{file}: tensor {info.name} ({info.dtype}, shape {list(info.shape)}) does not "
                f"fill its {info.stop - info.start:,} bytes; the file is damaged."
            )
    return infos


class Checkpoint(Mapping[str, TensorInfo]):
    """The tensors of one safetensors model, whole or sharded, by the names in its files.

    Args:
        folder: a local model folder.
        stem: file stem; `model` for weights, a kind for a sidecar.

    Raises:
        CheckpointError: no such files, a shard is missing, or a file is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str], stem: str = "model"):
        self.folder = Path(folder)
        self.stem = stem
        self._infos: dict[str, TensorInfo] = {}
        self._open: dict[tuple[Path, str], safe_open] = {}
        self._streams: dict[Path, ahead.Stream] = {}
        for file, names in self._files().items():
            infos = read_tensor_infos(file)
            missing = (names or set()) - infos.keys()
            if missing:
                raise CheckpointError(
                    f"{file} lacks {len(missing)} tensors that the index lists, for example "
                    f"{min(missing)}; the index and the shards do not belong together."
                )
            self._infos |= infos
        self._check_alone()

    def _check_alone(self) -> None:
        """Refuse another model's whole file beside the shards: the older one of two in a folder."""
        whole = self.folder / f"{self.stem}.safetensors"
        if not whole.exists() or any(info.file == whole for info in self._infos.values()):
            return
        others = read_tensor_infos(whole)
        for name in sorted(others.keys() | self.keys()):
            same = name in others and name in self
            if not same or others[name].digest() != self[name].digest():
                raise CheckpointError(
                    f"{self.folder} holds two models, and {name} differs: {whole.name}, which "
                    f"transformers reads, and the shards of {whole.name}.index.json, which "
                    "mergekit reads. Remove the older one."
                )

    def _files(self) -> dict[Path, set[str] | None]:
        """Map each file to the names that the index promises in it (None without an index)."""
        whole = self.folder / f"{self.stem}.safetensors"
        index = self.folder / f"{self.stem}.safetensors.index.json"
        if index.exists():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                files: dict[Path, set[str] | None] = {}
                for name, file in weight_map.items():
                    if file != Path(file).name:
                        raise CheckpointError(f"{index} points outside its folder, to {file!r}.")
                    names = files.setdefault(self.folder / file, set())
                    assert names is not None
                    names.add(name)
                return files
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(
                    f"{index} is not a readable shard index ({error})."
                ) from error
        if whole.exists():
            return {whole: None}
        pickles = sorted(self.folder.glob("pytorch_model*.bin"))
        if pickles:
            raise CheckpointError(
                f"{self.folder} holds only pickled weights ({pickles[0].name}). Pickles can run "
                "code and are not read; load the model with transformers and save_pretrained it, "
                "which writes safetensors."
            )
        raise CheckpointError(f"{self.folder} has no {whole.name} and no {index.name}.")

    def __getitem__(self, name: str) -> TensorInfo:
        return self._infos[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def load(self, name: str, device: str = "cpu") -> torch.Tensor:
        """Load one tensor as stored, from any thread; KeyError if there is no such name."""
        info = self._infos[name]
        stream = self._streams.setdefault(info.file, ahead.Stream(info.file))
        stream.ask_for(info.start, info.stop)
        key = info.file, device
        if key not in self._open:
            self._open[key] = safe_open(info.file, framework="pt", device=device)
        tensor: torch.Tensor = self._open[key].get_tensor(name)
        return tensor
