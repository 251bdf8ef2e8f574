"""mergekit graph tasks: merge what was loaded, copy what is not merged.

    LoadTheta × n, LoadPrecision × n ─ Together ─┬─ MergeTask ── (mergekit's SaveTensor)
                      └ of inputs: SharedTask ───┘
    MergeTask × parts ── ConvertTask
    LoadTheta ── CopyTask

Tasks that are equal are done once, so layers that share their inputs load and factorise them once.
Their labels begin alike: the executor merges such layers one after the other, and what they share
does not stay in memory for longer.
"""

from __future__ import annotations

import functools
from itertools import chain
from typing import Any, TypeAlias

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.graph import Task

from fisher_mergekit.errors import CheckpointError
from fisher_mergekit.merging import files
from fisher_mergekit.merging.loading import OwnRows, Precision, Theta, Together
from fisher_mergekit.precision import equation, kind_for, rows

Options: TypeAlias = tuple[tuple[str, Any], ...]
"""A kind's options as pairs: tasks that are equal are done once, so all in them is compared."""


class SharedTask(Task[Any]):
    """What all layers that get the same inputs share: those inputs, factorised.

    Attributes:
        kind: which precision.
        inputs: each model's input factor.
        lambdas: one a model.
        options: the kind's own.
        label: of the first of the layers; they are merged one after the other.
    """

    kind: str
    inputs: tuple[Precision, ...]
    lambdas: tuple[float, ...]
    label: str
    options: Options = ()

    def arguments(self) -> dict[str, Task[Any]]:
        """Return the task that loads the inputs' factors."""
        return {"inputs": Together(tasks=self.inputs)}

    def group_label(self) -> str:
        """Return the group's label."""
        return self.label

    def uses_accelerator(self) -> bool:
        """Ask mergekit to move all inputs to the device that computes."""
        return True

    def execute(self, inputs: tuple[torch.Tensor, ...], **_: Any) -> Any:
        """Return what the kind makes of them, on the device that computes."""
        return kind_for(self.kind).common(inputs, self.lambdas, **dict(self.options))


class MergeTask(Task[torch.Tensor]):
    """Solve Σᵢ λᵢ Cᵢ θ = Σᵢ λᵢ Cᵢ θᵢ for one output tensor.

    Attributes:
        name: the output tensor's name.
        kind: which precision.
        thetas: the models that count here, in the recipe's order.
        lambdas: one a theta.
        precisions: what was measured, one tuple a theta; empty ones for the identity.
        options: the kind's own.
        shared: what the layers that share their inputs have in common.
        present: of a matrix whose precision does not tell its rows apart, and of which not all
            models have all rows: which they have, one a theta.
        input_axis: a matrix's axis along which its inputs run; the kinds have them run along the
            last.
        dtype: the result's; None promotes what the thetas are stored in.
        label: the name under which the executor groups it; None for the tensor's own.
    """

    name: str
    kind: str
    thetas: tuple[Theta, ...]
    lambdas: tuple[float, ...]
    precisions: tuple[tuple[Precision, ...], ...]
    options: Options = ()
    shared: SharedTask | None = None
    present: tuple[OwnRows, ...] = ()
    input_axis: int = -1
    dtype: str | None = None
    label: str | None = None

    def arguments(self) -> dict[str, Task[Any]]:
        """Return the tasks that load the thetas and their precisions."""
        groups = self._groups()
        if self.shared is None:  # one task, because nothing in it is what others need, too
            groups = [tuple(task for group in groups for task in group)]
        arguments: dict[str, Task[Any]] = {
            f"group_{number}": Together(tasks=group) for number, group in enumerate(groups)
        }
        if self.shared is not None:
            arguments["shared"] = self.shared
        return arguments

    def _groups(self) -> list[tuple[Task[torch.Tensor], ...]]:
        """Return what is loaded: thetas, rows, then precisions, their first parts first."""
        parts = range(max(map(len, self.precisions)))
        columns = [tuple(p[part] for p in self.precisions if part < len(p)) for part in parts]
        return [group for group in (self.thetas, self.present, *columns) if group]

    def group_label(self) -> str:
        """Return the output tensor's name, or the label of the layers that share their inputs."""
        return self.label or self.name

    def uses_accelerator(self) -> bool:
        """Ask mergekit to move all inputs to the device that computes."""
        return True

    def execute(self, shared: Any = None, **groups: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Return the merged tensor; computed in float32 or better, rounded once.

        Raises:
            CheckpointError: the result is not finite; names the model whose weights are not.
        """
        tasks = chain.from_iterable(self._groups())
        loaded = chain.from_iterable(groups[f"group_{number}"] for number in range(len(groups)))
        made = dict(zip(tasks, loaded, strict=True))
        thetas = tuple(made[task] for task in self.thetas)
        present = tuple(made[task] for task in self.present)
        precisions = [tuple(made[task] for task in own) for own in self.precisions]
        options = dict(self.options)
        if self.shared is not None:
            options["shared"] = shared
        turned = [theta.mT for theta in thetas] if self.input_axis == -2 else thetas
        stored = functools.reduce(torch.promote_types, (theta.dtype for theta in thetas))
        dtype = dtype_from_name(self.dtype) or stored
        if self.present:
            result = rows.solve(
                self.kind,
                turned,
                [inputs_of for (inputs_of,) in precisions],
                self.lambdas,
                [own >= 0 for own in present],
                name=self.name,
                dtype=dtype,
                **options,
            )
        else:
            system = kind_for(self.kind).system(precisions, self.lambdas, **options)
            result = equation.solve(system, turned, self.lambdas, name=self.name, dtype=dtype)
        if not _is_finite(result):
            self._blame(thetas, result.dtype)
        return result.mT.contiguous() if self.input_axis == -2 else result

    def _blame(self, thetas: tuple[torch.Tensor, ...], dtype: torch.dtype) -> None:
        """Say whose fault it is that the result is not finite."""
        for task, theta in zip(self.thetas, thetas, strict=True):
            if not _is_finite(theta):
                raise CheckpointError(
                    f"{task.name} of {task.model} holds NaN or infinite weights, so {self.name} "
                    "cannot be merged. Repair the model, or keep the tensor out with `exclude:`."
                )
        raise CheckpointError(
            f"the merged {self.name} does not fit into {dtype}; choose another `dtype:`."
        )


class ConvertTask(Task[torch.Tensor]):
    """Put an output tensor together from what is merged of the tensors in the files.

    Attributes:
        name: the output tensor's name.
        model: the one whose files' layout the pieces have.
        target: the tensor's name in that model's memory.
        pieces: the merged tensors, by their names in its files.
    """

    name: str
    model: ModelReference
    target: str
    pieces: tuple[tuple[str, MergeTask], ...]

    def arguments(self) -> dict[str, Task[Any]]:
        """Return the tasks that merge the pieces."""
        return dict(self.pieces)

    def group_label(self) -> str:
        """Return the output tensor's name."""
        return self.name

    def execute(self, **pieces: torch.Tensor) -> torch.Tensor:
        """Return what transformers makes of them; it only moves numbers."""
        return files.OPENED.again(self.model).convert(self.target, pieces)


class CopyTask(Task[torch.Tensor]):
    """Take one output tensor from one model: an excluded tensor, or a buffer that all share.

    Attributes:
        name: the output tensor's name.
        dtype: the dtype to cast to; None keeps it as stored.
    """

    name: str
    theta: Theta
    dtype: str | None = None

    def arguments(self) -> dict[str, Task[Any]]:
        """Return the task that loads the tensor."""
        return {"tensor": self.theta}

    def group_label(self) -> str:
        """Return the output tensor's name."""
        return self.name

    def execute(self, tensor: torch.Tensor, **_: Any) -> torch.Tensor:
        """Return the tensor, cast.

        Raises:
            CheckpointError: values that are finite as stored do not fit into the dtype.
        """
        result = tensor.to(dtype_from_name(self.dtype) or tensor.dtype)
        is_cast = result.dtype != tensor.dtype
        if is_cast and _is_finite(tensor) and not _is_finite(result):
            raise CheckpointError(
                f"{self.name} of {self.theta.model} does not fit into {result.dtype}; choose "
                "another `dtype:`."
            )
        return result


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; `isfinite` takes many times longer than both of these.

    A sum is not finite if a value is not. But that of large numbers may overflow, and then both
    ends are looked at.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return bool(tensor.sum().isfinite()) or all(end.isfinite() for end in tensor.aminmax())
