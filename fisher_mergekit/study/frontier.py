"""Two models merged with many lambdas, without writing a checkpoint for each.

A merge of two specialists trades one task for the other, and lambda says how. One lambda is one
point; the curve over all of them is what a method can do. The arithmetic is that of the merge
methods themselves (`precision/`), on the same files, so a point here is the checkpoint that
`mergekit-yaml` writes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from fisher_mergekit.precision import fisher, solve
from fisher_mergekit.sidecar.reader import Sidecar
from fisher_mergekit.study.heads import WEIGHTS, is_head

COMPARED = ("linear", "fisher")
"""The isotropic merge under mergekit's name for it, and ours."""


@dataclass(frozen=True)
class Bodies:
    """What models have in common: all tensors but the heads, and their Fishers.

    Attributes:
        thetas: each model's tensors.
        fishers: each model's Fisher, of the same names and shapes.
        scales: each Fisher's root mean square over all of them.
    """

    thetas: tuple[Mapping[str, Tensor], ...]
    fishers: tuple[Mapping[str, Tensor], ...]
    scales: tuple[float, ...]

    def merge(self, method: str, lambdas: Sequence[float]) -> dict[str, Tensor]:
        """Return the merged body: `linear` or `fisher`, with the methods' defaults."""
        merged = {}
        for name in self.thetas[0]:
            thetas = [theta[name] for theta in self.thetas]
            if method == "linear":
                merged[name] = solve("identity", thetas, [()] * len(thetas), lambdas)
            else:
                precisions = [(values[name],) for values in self.fishers]
                merged[name] = solve("fisher", thetas, precisions, lambdas, scales=self.scales)
        return merged


def read_bodies(models: Sequence[Path], *, exclude: Sequence[str] = ("classifier",)) -> Bodies:
    """Read the bodies of measured models; their sidecars lie in their own folders."""
    thetas, fishers, scales = [], [], []
    for model in models:
        tensors = load_file(model / WEIGHTS)
        body = {name: theta for name, theta in tensors.items() if not is_head(name, exclude)}
        sidecar = Sidecar(model / "sidecar", "fisher")
        squares = math.fsum(sidecar.sum_of_squares(name) for name in body)
        thetas.append(body)
        fishers.append({name: sidecar.load(name) for name in body})
        scales.append(
            fisher.root_mean_square(squares, sum(theta.numel() for theta in body.values()))
        )
    return Bodies(tuple(thetas), tuple(fishers), tuple(scales))
