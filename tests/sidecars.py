"""Small sidecars of made-up weights, written and read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fisher_mergekit.sidecar.header import (
    HEADER_NAME,
    FactorNames,
    Header,
    Measurement,
    ModelIdentity,
    Settings,
    WeightRecord,
)
from fisher_mergekit.sidecar.reader import Sidecar
from fisher_mergekit.sidecar.writer import describe, write_sidecar

KIND = "fisher"


def rewrite_header(folder: Path, change: Callable[[dict], object]) -> dict:
    """Let `change` edit the header's content, and write it as a newer version of us would."""
    path = folder / HEADER_NAME
    content = json.loads(path.read_text())
    del content["checksum"]
    change(content)
    content = json.loads(Header.model_validate(content).to_json())
    path.write_text(json.dumps(content))
    return content


def values(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (4, 6), "a.bias": (4,), "b.weight": (3, 4), "scalar": ()}
    return {n: torch.rand(shape, generator=generator).to(dtype) for n, shape in shapes.items()}


def measurement(
    tensors: dict[str, Tensor], *, weights: str = "w", wall: float = 1.0
) -> Measurement:
    return Measurement(
        settings=Settings(
            estimator="exact", unit="sequence", likelihood="categorical",
            examples=8, tokens=64, max_length=16, seed=0,
        ),
        calibration={"path": "made-up"},
        weights={
            name: WeightRecord(dtype="F32", shape=tuple(t.shape), digest=f"{weights}-{name}")
            for name, t in tensors.items()
        },
        tensors=describe(tensors),
        wall_seconds=wall,
    )  # fmt: skip


def write(
    folder: Path,
    kind: str = KIND,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shard_size: int = 1 << 30,
    **options: object,
) -> Path:
    """Write a sidecar; the same arguments give the same content."""
    tensors = values(seed, dtype)
    identity = ModelIdentity(reference="./made-up", architecture="MadeUp")
    described = measurement(tensors, **options)  # type: ignore[arg-type]
    write_sidecar(folder, kind, identity, described, tensors, shard_size=shard_size)
    return folder


def write_factors(
    folder: Path,
    tensors: dict[str, Tensor],
    factors: dict[str, FactorNames],
    shapes: dict[str, tuple[int, ...]],
    *,
    kind: str = "kfac",
    digest: str = "d",
    **settings: object,
) -> Path:
    """Write a sidecar of factors.

    Args:
        tensors: what is stored.
        factors: by weight, which of it describes the weight.
        shapes: the weights'.
        digest: every weight's.
    """
    matrices = {
        name
        for weight, record in factors.items()
        for name in record.names
        if name in tensors and tensors[name].dim() == len(shapes[weight])
    }
    base = {
        "estimator": "exact", "unit": "sequence", "likelihood": "categorical",
        "examples": 8, "tokens": 64, "max_length": 16, "seed": 0,
    }  # fmt: skip
    described = Measurement(
        settings=Settings.model_validate({**base, **settings}),
        calibration={"path": "made-up"},
        weights={n: WeightRecord(dtype="F32", shape=s, digest=digest) for n, s in shapes.items()},
        tensors=describe(tensors, matrices),
        factors=factors,
    )
    identity = ModelIdentity(reference="./made-up", architecture="MadeUp")
    write_sidecar(folder, kind, identity, described, tensors)
    return folder


def open_and_load(path: Path, kind: str = KIND) -> dict[str, Tensor]:
    """Read everything, off the file."""
    sidecar = Sidecar(path, kind)
    return {name: sidecar.load(name).clone() for name in sidecar}
