"""Reading a sidecar: opened and checked without loading a tensor, then loaded one by one."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from fisher_mergekit.errors import CheckpointError, SidecarError, SidecarMissing
from fisher_mergekit.sidecar.checkpoint import Checkpoint, TensorInfo, samples_at_hand
from fisher_mergekit.sidecar.header import HEADER_NAME, METADATA_KEY, Header, Measurement
from fisher_mergekit.sidecar.location import FOLDER_NAME

SCANNED = 1 << 21
"""Bytes that are read from memory once for all that is to be known of them. Threads that scan wait
for each other's interpreter between two such pieces, so smaller ones are no faster."""
_BITS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}


def scan(tensor: torch.Tensor) -> tuple[str, bool]:
    """Look through a CPU tensor's bytes once.

    Returns:
        The checksum in the header, xxh3-128, and whether all values are finite and none has a
        minus sign. Those of one dtype are in the order of their bits read as unsigned integers,
        infinity above all numbers and minus signs above that; so one maximum tells.
    """
    bits = _BITS[tensor.element_size()]
    values = tensor.detach().contiguous().reshape(-1).view(bits).numpy()
    hasher, greatest = xxhash.xxh3_128(), 0
    step = SCANNED // tensor.element_size()
    for start in range(0, values.size, step):
        block = values[start : start + step]
        hasher.update(block.data)
        greatest = max(greatest, int(block.max()))
    infinity = torch.tensor(torch.inf, device="cpu").to(tensor.dtype).view(bits).item()
    return hasher.hexdigest(), greatest < infinity


def checksum(tensor: torch.Tensor) -> str:
    """Return xxh3-128 of a CPU tensor's bytes, the checksum in the header."""
    return scan(tensor)[0]


def read_header(path: Path) -> Header | None:
    """Return the header of a sidecar folder or file, or None where there is no sidecar.

    Raises:
        SidecarError: there is something, but not a readable header.
    """
    if path.suffix == ".safetensors":
        if not path.exists():
            return None
        Checkpoint(path.parent, path.stem)  # says what is wrong with a damaged file
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(METADATA_KEY)
        except SafetensorError as error:  # such as a dtype that is too new for it
            raise SidecarError(f"cannot read the sidecar {path}: {error}") from error
        if text is None:
            raise SidecarError(
                f"{path} has no header in its metadata, so nobody can tell what was measured. "
                "Give the whole sidecar folder, or measure the model again."
            )
        return Header.from_json(text, path)
    file_path = path / HEADER_NAME
    if not file_path.exists():
        return None
    try:
        content = file_path.read_bytes()
    except OSError as error:
        raise SidecarError(f"cannot read {file_path}: {error.strerror or error}.") from error
    return Header.from_json(content, file_path)


class Sidecar(Mapping[str, TensorInfo]):
    """The stored tensors of one kind, structurally checked: names, shapes, sizes and header agree.

    Args:
        path: a sidecar folder, or one `.safetensors` file.
        kind: `fisher`, …

    Raises:
        SidecarError: missing, partial, corrupt, or without this kind. The message says which;
            the caller adds the command that mends it.
    """

    def __init__(self, path: Path, kind: str):
        self.path = path
        self.kind = kind
        try:
            header = read_header(path)
            if header is None:
                inside = path / FOLDER_NAME
                hint = ""
                if (inside / HEADER_NAME).exists():
                    hint = f" There is one at {inside}: write `sidecar: {inside}`, or measure it."
                raise SidecarMissing(f"there is no sidecar at {path}.{hint}")
            if kind not in header.kinds:
                raise SidecarMissing(
                    f"the sidecar {path} has no complete {kind!r}; it has "
                    f"{', '.join(sorted(header.kinds)) or 'nothing'}."
                )
            if path.suffix == ".safetensors":
                self._tensors = Checkpoint(path.parent, path.stem)
            else:
                self._tensors = Checkpoint(path, kind)
        except CheckpointError as error:
            raise SidecarError(f"the sidecar is damaged: {error.message}") from error
        self.header = header
        self.measurement: Measurement = header.kinds[kind]
        self._check_structure()

    def _check_structure(self) -> None:
        recorded, stored = set(self.measurement.tensors), set(self._tensors)
        if recorded != stored:
            odd = min(recorded ^ stored)
            where = "only in its header" if odd in recorded else "only in its files"
            raise SidecarError(
                f"the sidecar {self.path} is partial: {len(recorded ^ stored)} tensors, for "
                f"example {odd}, are {where}."
            )
        measurement = self.measurement
        shapes = {name: info.shape for name, info in self._tensors.items()}
        misfits = {
            name: record.misfit(measurement.weights[name].shape, shapes)
            if name in measurement.weights
            else "its weight is not in the header"
            for name, record in measurement.factors.items()
        }
        used = {name for record in measurement.factors.values() for name in record.names}
        for name, shape in shapes.items() if not measurement.factors else ():
            weight = measurement.weights.get(name)
            held = list(weight.shape) if weight else "is not in the header"
            if weight is None or shape != weight.shape:
                misfits[name] = f"{name} has shape {list(shape)}, its weight {held}"
        for name in shapes.keys() - used if measurement.factors else ():
            misfits[name] = f"no weight is described by {name}"
        problem = next(filter(None, misfits.values()), None)
        if problem is not None:
            raise SidecarError(f"the sidecar {self.path} is corrupt: {problem}.")

    @property
    def weights(self) -> Collection[str]:
        """Names of the weights that it describes."""
        return (self.measurement.factors or self.measurement.tensors).keys()

    def stored(self, weight: str) -> tuple[str, ...]:
        """Return the names of the stored tensors that describe a weight."""
        factors = self.measurement.factors
        return factors[weight].names if factors else (weight,)

    def __getitem__(self, name: str) -> TensorInfo:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def foreign(self, weights: Mapping[str, TensorInfo], names: Collection[str]) -> list[str]:
        """Return the names whose weights are not the ones that were measured."""
        recorded = self.measurement.weights
        with samples_at_hand(weights[name] for name in names):
            return [name for name in names if recorded[name].digest != weights[name].digest()]

    def sum_of_squares(self, name: str) -> float:
        """Return the sum of squares of one measured tensor, from the header."""
        return self.measurement.tensors[name].sum_of_squares

    def load(self, name: str) -> torch.Tensor:
        """Load one measured tensor to the CPU and check it against its checksum.

        Raises:
            SidecarError: the bytes are not those that were written.
        """
        return self.load_scanned(name)[0]

    def load_scanned(self, name: str) -> tuple[torch.Tensor, bool]:
        """Load like `load`, and tell whether all values are finite and none has a minus sign.

        Raises:
            SidecarError: the bytes are not those that were written.
        """
        try:
            tensor = self._tensors.load(name)
        except (OSError, SafetensorError) as error:
            raise SidecarError(
                f"cannot read {name} from the sidecar {self.path}: {error}"
            ) from error
        found, is_plain = scan(tensor)
        if found != self.measurement.tensors[name].checksum:
            raise SidecarError(
                f"the sidecar {self.path} is corrupt: the bytes of {name} are not those that were "
                "written (checksum differs). Measure the model again."
            )
        return tensor, is_plain
