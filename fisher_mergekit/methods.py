"""The merge methods, one row each: a method is a choice of precision, nothing else differs.

This table is read by the recipe (which keys exist), by the measuring step (which kinds to measure)
and by the mergekit wing (what to register). It imports nothing heavy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class MethodParameter:
    """One key under a recipe's `parameters`.

    Attributes:
        value_type: of its values; numbers are finite.
        default: where the recipe does not say.
        choices: of a word, which there are.
        least: of a number.
        most: of a number.
        whole: whether it holds for the whole recipe only, and not for a slice or some tensors.
    """

    name: str
    value_type: type
    default: bool | int | float | str
    choices: tuple[str, ...] = ()
    least: float = 0.0
    most: float = math.inf
    whole: bool = False


@dataclass(frozen=True)
class Method:
    """A `merge_method`: the kind of sidecar it reads, and its own parameters.

    A parameter that the kind's `system` knows by name is handed to it.
    """

    name: str
    kind: str
    pretty_name: str
    reference_url: str
    parameters: tuple[MethodParameter, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the method's own parameters."""
        return tuple(parameter.name for parameter in self.parameters)

    @property
    def shared_keys(self) -> tuple[str, ...]:
        """Names of those that a slice or a module can have of its own."""
        return tuple(parameter.name for parameter in self.parameters if not parameter.whole)


NORMALIZE = MethodParameter("normalize_fishers", bool, True)
"""Whether each model's precision is divided by its own scale."""
OFFDIAGONAL = MethodParameter("offdiagonal", float, 0.9, most=1.0)
"""What the off-diagonals of factors are multiplied by."""
OTHERS = MethodParameter("others", str, "mean", choices=("mean", "fisher"))
"""How tensors are merged that the kind does not describe."""
EMBEDDINGS = MethodParameter("embeddings", bool, False)
"""Whether embeddings are merged by the counts of their tokens, or as other tensors."""
PRIOR = MethodParameter("prior", bool, False)
"""Whether base_model's own Fisher is a prior; lambdas are absolute then."""
PRIOR_SIDECAR = MethodParameter("prior_sidecar", str, "", whole=True)
"""Where base_model's Fisher is, if not in the place of a model's sidecar."""
ALLOW_MIXED = MethodParameter("allow_mixed", bool, False)
"""Whether precisions that were measured differently may be weighed against each other."""

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="fisher",
            kind="fisher",
            pretty_name="Fisher-weighted averaging",
            reference_url="https://arxiv.org/abs/2111.09832",
            parameters=(
                NORMALIZE,
                MethodParameter("floor", float, 1e-6),
                MethodParameter("favor_base", bool, False),
                PRIOR,
                PRIOR_SIDECAR,
                ALLOW_MIXED,
            ),
        ),
        Method(
            name="regmean",
            kind="gram",
            pretty_name="RegMean",
            reference_url="https://arxiv.org/abs/2212.09849",
            parameters=(
                OFFDIAGONAL,
                MethodParameter("ridge", float, 0.0),
                EMBEDDINGS,
                OTHERS,
                ALLOW_MIXED,
            ),
        ),
        Method(
            name="mats",
            kind="kfac",
            pretty_name="MaTS (Kronecker-factored Fisher)",
            reference_url="https://arxiv.org/abs/2312.04339",
            parameters=(
                NORMALIZE,
                OFFDIAGONAL,
                MethodParameter("tolerance", float, 1e-6),
                MethodParameter("iterations", int, 1000, least=1),
                EMBEDDINGS,
                OTHERS,
                ALLOW_MIXED,
            ),
        ),
    )
}
