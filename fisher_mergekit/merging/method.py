"""The object that mergekit's registry holds for each of our methods.

mergekit gives a method's kernel tensors and settings, but not the *source* tensors' names, so a
kernel cannot know which statistics belong to what it was given (in a sliced recipe the output's
name is another layer's). Hence the planner merges, and the kernel only refuses.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any, NoReturn

from mergekit.merge_methods.base import (
    InputContract,
    MergeMethod,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
    TensorGroup,
)

from fisher_mergekit.errors import FisherMergekitError
from fisher_mergekit.methods import Method, MethodParameter

LAMBDA = ParameterSpec("lambda", float | None, ParameterScope.INPUT, default=None)
WEIGHT = ParameterSpec("weight", float | None, ParameterScope.INPUT, default=None)
SIDECAR = ParameterSpec("sidecar", str | None, ParameterScope.INPUT, default=None)


@functools.cache
def method_parameter(own: MethodParameter) -> ParameterSpec:
    """Return what mergekit is to know of one of a method's own parameters."""
    return ParameterSpec(own.name, own.value_type, ParameterScope.SHARED, default=own.default)


class PlannedMethod(MergeMethod):
    """A merge method that is computed by the planned tasks, never by a kernel.

    Its input contract ignores the base: `base_model` may be absent, listed, or listed nowhere.
    """

    def __init__(self, row: Method):
        self.spec = MergeMethodSpec(
            name=row.name,
            parameters=(LAMBDA, WEIGHT, SIDECAR, *map(method_parameter, row.parameters)),
            contract=InputContract(),
            pretty_name=row.pretty_name,
            reference_url=row.reference_url,
        )

    def _refuse(self) -> NoReturn:
        raise FisherMergekitError(
            f"merge method {self.spec.name!r} cannot merge tensors that are handed over one by "
            "one, not with a `sidecar` given either: which part of it is theirs goes by the names "
            "in the models' own files, and how much a model counts by all of its tensors together; "
            "write a recipe and run mergekit-yaml (not mergekit-pytorch, merge_tensors or "
            "merge_state_dicts)."
        )

    def validate_inputs(
        self,
        input_ids: Sequence[Hashable],
        base_id: Hashable | None = None,
        *,
        group_name: str | None = None,
    ) -> None:
        """Validate a slice's models, or refuse before `mergekit-pytorch` begins.

        The planner names the slice that it asks about. Who names nothing has no recipe for it.
        """
        if group_name is None:
            self._refuse()
        super().validate_inputs(input_ids, base_id, group_name=group_name)

    def __call__(self, groups: Sequence[TensorGroup], /, **_: Any) -> NoReturn:
        """Refuse: called by `merge_tensors` and `merge_state_dicts`."""
        self._refuse()

    def _execute_resolved(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        # Called by `mergekit-pytorch`.
        self._refuse()

    def _execute(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        self._refuse()
