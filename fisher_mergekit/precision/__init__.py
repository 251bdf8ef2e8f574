r"""The mathematics: pure functions on tensors.

Merging maximises the joint likelihood of the models' posteriors. Model i's posterior is a Gaussian
with mean θᵢ and precision matrix Cᵢ; λᵢ says how much model i counts. The best θ solves

    (Σᵢ λᵢ Cᵢ) θ = Σᵢ λᵢ Cᵢ θᵢ                                            `equation.py`

A *kind* is a choice of Cᵢ and one file here, found by its name. It defines `STATISTICS`, what has
to be measured of each model, if it has a sidecar of its own, and `system`, which makes Σᵢ λᵢ Cᵢ of
what was measured; nothing else differs.

| kind       | Cᵢ of a matrix W `[o, i]` | measured of each model         | solved by           |
|------------|---------------------------|--------------------------------|---------------------|
| `identity` | the identity              | nothing                        | division            |
| `fisher`   | diag(Fᵢ)                  | Fᵢ, shaped like W              | division            |
| `prior`    | diag(F₀ + Fᵢ)             | Fᵢ, and F₀ of the base         | division            |
| `gram`     | identity ⊗ Aᵢ             | Aᵢ of the inputs               | one factorisation   |
| `kfac`     | Bᵢ ⊗ Aᵢ                   | Aᵢ, and Bᵢ of the outputs'     | conjugate gradients |
|            |                           | gradients                      |                     |

    equation.py    the equation, for every kind
    statistics.py  what can be measured for one
    diagonal.py    weighted means: the solution for a diagonal Cᵢ
    kronecker.py   factors A and B, and the inverse of their sums
    iterative.py   conjugate gradients
    rows.py        rows that not every model has, such as a head's tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol

from torch import Tensor

from fisher_mergekit.precision.equation import System
from fisher_mergekit.precision.equation import solve as _solve
from fisher_mergekit.precision.statistics import Statistics

Precision = tuple[Tensor, ...]
"""What was measured of one tensor of one model: nothing, a Fisher, or one or two factors."""


class Kind(Protocol):
    """What a file of a kind defines.

    Attributes:
        STATISTICS: what its sidecar holds, if it has one of its own.
    """

    STATISTICS: Statistics

    def system(
        self, precisions: Sequence[Precision], lambdas: Sequence[float], **options: Any
    ) -> System:
        """Return Σᵢ λᵢ Cᵢ.

        Args:
            precisions: one a model, finite, all on one device; borrowed, never written to.
            lambdas: one a model, not all zero. A model with lambda 0 is not there.
            options: what the kind needs besides, such as each model's scale.
        """
        ...

    def common(self, inputs: Sequence[Tensor], lambdas: Sequence[float], **options: Any) -> object:
        """Return what `system` takes as its option `shared`, for all layers of the same inputs.

        Only kinds define it whose first factor several layers can share.
        """
        ...


def kind_for(name: str) -> Kind:
    """Return the kind of that name."""
    return import_module(f"{__name__}.{name}")


def solve(
    kind: str,
    thetas: Sequence[Tensor],
    precisions: Sequence[Precision],
    lambdas: Sequence[float],
    **options: Any,
) -> Tensor:
    """Return the merged tensor: the solution of the equation for one kind of precision.

    Args:
        kind: which precision.
        thetas: n tensors of one shape, `[…, o, i]` where the precision has factors; any floating
            dtype.
        precisions: n, on the same device.
        lambdas: n, not all zero.
        options: the kind's own.

    Returns:
        A new tensor in the dtype that the kind computes in: float64 with factors that are matrices,
        else float32 (float64 if any theta is).
    """
    return _solve(kind_for(kind).system(precisions, lambdas, **options), thetas, lambdas)
