"""The merge methods, one row each: a method is a choice of precision, nothing else differs.

This table is read by the recipe (which keys exist), by the measuring step (which kind to measure)
and by the mergekit wing (what to register). It imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MethodParameter:
    """One key under a recipe's `parameters`: its type and default."""

    name: str
    value_type: type
    default: bool | float


@dataclass(frozen=True)
class Method:
    """A `merge_method`: the kind of sidecar it reads, and its own parameters."""

    name: str
    kind: str
    pretty_name: str
    reference_url: str
    parameters: tuple[MethodParameter, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the method's own parameters."""
        return tuple(parameter.name for parameter in self.parameters)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="fisher",
            kind="fisher",
            pretty_name="Fisher-weighted averaging",
            reference_url="https://arxiv.org/abs/2111.09832",
            parameters=(
                MethodParameter("normalize_fishers", bool, True),
                MethodParameter("floor", float, 1e-6),
                MethodParameter("favor_base", bool, False),
                MethodParameter("allow_mixed", bool, False),
            ),
        ),
    )
}
