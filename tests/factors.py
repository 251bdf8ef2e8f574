"""Sidecars of made-up factors (Grams of random rows), and what they merge to, by hand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import dense_oracle
import torch
from models import Tensors, make_model, read

from fisher_mergekit.sidecar.checkpoint import Checkpoint
from fisher_mergekit.sidecar.header import (
    FactorNames,
    Measurement,
    ModelIdentity,
    Settings,
    WeightRecord,
)
from fisher_mergekit.sidecar.writer import describe, write_sidecar

EMBEDDINGS = ("embed", "wte", "wpe")
SHARED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj",
          "key": "query", "value": "query", "w3": "w1"}  # fmt: skip
"""Layers that get the same inputs as another one."""


@dataclass
class Described:
    """A model, and the factors of its matrices."""

    folder: Path
    kind: str
    thetas: Tensors
    factors: dict[str, FactorNames]
    stored: Tensors

    def precision(self, name: str) -> tuple[torch.Tensor, ...]:
        return tuple(self.stored[part] for part in self.factors[name].names)

    def matrix(self, name: str) -> torch.Tensor:
        """Return a weight as `[o, i]`."""
        theta = self.thetas[name].double()
        return theta.mT if self.factors[name].input_axis == -2 else theta

    def is_embedding(self, name: str) -> bool:
        return name in self.factors and self.stored[self.factors[name].inputs].ndim == 1

    def write(self, **changes: object) -> Path:
        """Write the sidecar; settings and fields of the measurement can be changed."""
        return write_factors(self, **changes)


def factors_of(kind: str, thetas: Tensors) -> dict[str, FactorNames]:
    """Return the factors of every matrix of a model, by the habits of its architecture."""
    found = {}
    for name, theta in sorted(thetas.items()):
        if theta.ndim != 2 or not theta.is_floating_point():
            continue
        layer = name.split(".")[-2]
        transposed = ".h." in name or any(part in name for part in EMBEDDINGS)
        shared = name.replace(f".{layer}.", f".{SHARED.get(layer, layer)}.")
        found[name] = FactorNames(
            inputs=f"{shared}.inputs",
            outputs=f"{name}.outputs" if kind == "kfac" else None,
            input_axis=-2 if transposed else -1,
        )
    return found


def random_factor(generator: torch.Generator, width: int, rows: int) -> torch.Tensor:
    x = torch.randn(rows, width, generator=generator)
    x *= 10.0 ** torch.randint(-1, 2, (width,), generator=generator)
    return x.mT @ x / rows


def make_described(
    folder: Path,
    family: str = "bert",
    kind: str = "gram",
    *,
    seed: int = 0,
    scale: float = 1.0,
    rows: int = 40,
    **config: object,
) -> Described:
    """Make a model and a sidecar of made-up factors."""
    make_model(folder, family, seed=seed, **config)  # type: ignore[arg-type]
    thetas = read(folder)
    factors = factors_of(kind, thetas)
    generator = torch.Generator().manual_seed(2000 + seed)
    stored: Tensors = {}
    for name, record in factors.items():
        outputs, inputs = thetas[name].shape
        if record.input_axis == -2:
            outputs, inputs = inputs, outputs
        if any(part in name for part in EMBEDDINGS):
            stored[record.inputs] = torch.rand(inputs, generator=generator) * scale
        elif record.inputs not in stored:
            stored[record.inputs] = random_factor(generator, inputs, rows) * scale
        if record.outputs is not None:
            stored[record.outputs] = random_factor(generator, outputs, rows)
    made = Described(folder, kind, thetas, factors, stored)
    made.write()
    return made


def write_factors(made: Described, *, out: Path | None = None, **changes: object) -> Path:
    settings = {
        "estimator": "exact", "unit": "sequence", "likelihood": "categorical", "examples": 8,
        "tokens": 64, "max_length": 16, "seed": 0,
    }  # fmt: skip
    settings |= {key: changes.pop(key) for key in list(changes) if key in settings}
    described = {n: i for n, i in Checkpoint(made.folder).items() if n in made.factors}
    measurement = Measurement.model_validate(
        {
            "settings": Settings.model_validate(settings),
            "calibration": {"path": "made-up"},
            "weights": {name: WeightRecord.of(i) for name, i in described.items()},
            "tensors": describe(made.stored, [n for n, t in made.stored.items() if t.ndim > 1]),
            "factors": made.factors,
            "unmeasured": {
                name: f"not described by {made.kind}"
                for name in made.thetas
                if name not in made.factors
            },
            **changes,
        }
    )
    identity = ModelIdentity(reference=str(made.folder), architecture="made-up")
    place = out or made.folder / "sidecar"
    write_sidecar(place, made.kind, identity, measurement, made.stored)
    return place


def scale(made: Described, names: Iterable[str]) -> float:
    """Return the root mean square of a Kronecker-factored Fisher over the named weights."""
    total, count = 0.0, 0
    for name in names:
        a, b = (dense_oracle.as_matrix(x) for x in made.precision(name))
        total += float(torch.kron(b, a).square().sum())
        count += made.thetas[name].numel()
    return math.sqrt(total / count)


def merged_matrix(
    parts: Sequence[tuple[Described, str, float]],
    scales: Sequence[float] | None = None,
    *,
    offdiagonal: float = 0.9,
) -> torch.Tensor:
    """Merge one weight by the dense equation.

    Args:
        parts: a model, the weight's name there, and lambda.
        scales: one a model, for `kfac`.
    """
    matrices = []
    for index, (made, name, lam) in enumerate(parts):
        shape = made.matrix(name).shape
        if made.kind == "gram":
            c = dense_oracle.gram(shape, made.precision(name), lam, offdiagonal=offdiagonal)
        else:
            of = scales[index] if scales else 1.0
            c = dense_oracle.kfac(shape, made.precision(name), lam, scale=of)
        matrices.append(c)
    found = dense_oracle.solution(matrices, [made.matrix(name) for made, name, _ in parts])
    first, name, _ = parts[0]
    return found.mT if first.factors[name].input_axis == -2 else found


def mean(tensors: Sequence[torch.Tensor], lambdas: Sequence[float]) -> torch.Tensor:
    total = sum(lam * t.double() for lam, t in zip(lambdas, tensors, strict=True))
    return total / sum(lambdas)


def merged_model(
    models: Sequence[Described],
    lambdas: Sequence[float],
    *,
    names: Iterable[str] | None = None,
    embeddings: bool = False,
    normalize: bool = True,
    offdiagonal: float = 0.9,
) -> Tensors:
    """Merge models that call their tensors alike; what has no factors is averaged."""
    first = models[0]
    names = list(first.thetas if names is None else names)
    by_kind = [n for n in names if n in first.factors and (embeddings or not first.is_embedding(n))]
    scales = None
    if first.kind == "kfac" and normalize:
        scales = [scale(made, by_kind) for made in models]
    merged = {}
    for name in names:
        if name in by_kind:
            parts = [(made, name, lam) for made, lam in zip(models, lambdas, strict=True)]
            merged[name] = merged_matrix(parts, scales, offdiagonal=offdiagonal)
        else:
            merged[name] = mean([made.thetas[name] for made in models], lambdas)
    return merged
