"""mergekit graph tasks: load a theta, load a precision, merge them, copy what is not merged.

    LoadTheta × n ───────────────────┐
    LoadPrecision × n ───────────────┼── MergeTask ── (mergekit's SaveTensor or ReturnTensor)
        └ of inputs: SharedTask ─────┘
    MergeTask × parts ── ConvertTask
    LoadTheta ── CopyTask

Tasks that are equal are done once, so layers that share their inputs load and factorise them once.
Their labels begin alike: the executor merges such layers one after the other, and what they share
does not stay in memory for longer.

The loading tasks are ours, not mergekit's `GatherTensors`, for three reasons: they load under the
very name that was checked; every task of an output tensor has the *output's* name in its group
label, so that the executor finishes one tensor before the next, also where two models' files call
it differently; and a model that does not count for a tensor is not read for it.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.graph import Task
from mergekit.io.tasks import LoaderCache

from fisher_mergekit.errors import CheckpointError, SidecarError
from fisher_mergekit.merging import files, sidecars
from fisher_mergekit.merging.remedies import command_for
from fisher_mergekit.precision import equation, kind_for, rows
from fisher_mergekit.sidecar.checkpoint import read_ahead


class Theta(Task[torch.Tensor]):
    """One model's part in an output tensor.

    Attributes:
        name: the tensor's name in the model's files; of one that is converted, in memory.
    """

    model: ModelReference
    name: str


class LoadTheta(Theta):
    """Load one tensor of one model, in the dtype it is stored in.

    Attributes:
        parts: what it is converted from, by name in the files.
        label: the output tensor's name.
        device: where to read it to; the CPU if None.
    """

    label: str
    parts: tuple[str, ...] = ()
    device: str | None = None

    def arguments(self) -> dict[str, Task[Any]]:
        """Return nothing: it depends on files only."""
        return {}

    def execute(self, **_: Any) -> torch.Tensor:
        """Return the tensor as stored; mergekit's loader owns the memory."""
        loader = LoaderCache().get(self.model)
        held = files.reopen(self.model)
        read_ahead(held[name] for name in self.parts or (self.name,) if name in held)

        def load(name: str) -> torch.Tensor:
            tensor: torch.Tensor = loader.get_tensor(name, device=self.device or "cpu")
            return tensor

        if not self.parts:
            return load(self.name)
        return held.convert(self.name, {p: load(p) for p in self.parts})

    def priority(self) -> int:
        """Load late, as mergekit's LoadTensor: only when nothing else can be done."""
        return -1000

    def group_label(self) -> str:
        """Return the output tensor's name."""
        return self.label


Form = Literal["elementwise", "diagonal", "matrix"]
"""What a stored tensor is: a number for each weight, or a factor's diagonal, or a factor."""


class Precision(Task[torch.Tensor]):
    """Something measured of one model's part in an output tensor."""


class OwnRows(Task[torch.Tensor]):
    """Which of a model's own rows stands in each row of an output tensor, `ABSENT` if none does.

    Attributes:
        size: rows of the output.
    """

    size: int


class LoadPrecision(Precision):
    """Load one measured tensor of one model, checked against its checksum.

    Attributes:
        path: the sidecar, a folder or one file.
        kind: which precision.
        name: the stored tensor's name; of one that is converted, the weight's in memory.
        parts: what it is converted from, by name in the files.
        form: what it is, and so which values it may hold.
        label: the name under which the executor groups it.
    """

    model: ModelReference
    path: Path
    kind: str
    name: str
    label: str
    parts: tuple[str, ...] = ()
    form: Form = "elementwise"

    def arguments(self) -> dict[str, Task[Any]]:
        """Return nothing: it depends on files only."""
        return {}

    def execute(self, **_: Any) -> torch.Tensor:
        """Return the precision on the CPU, checked; a factor's diagonal as a column.

        Raises:
            SidecarError: the bytes or the values are not what a measurement can have written.
        """
        if not self.parts:
            return self._load(self.name)
        return files.reopen(self.model).convert(self.name, {p: self._load(p) for p in self.parts})

    def _load(self, name: str) -> torch.Tensor:
        tensor = sidecars.reopen(self.path, self.kind).load(name)
        if not tensor.numel():
            return tensor
        # One pass for all three: a NaN anywhere makes both ends NaN.
        lowest, highest = tensor.aminmax()
        size = max(highest, -lowest)
        least = tensor.diagonal(dim1=-2, dim2=-1).min() if self.form == "matrix" else lowest
        if not (least >= 0 and size < torch.inf):
            raise self._corrupt(
                f"{name} holds values from {lowest.item()} to {highest.item()}, but a {self.kind} "
                + ("is finite, and its diagonal" if self.form == "matrix" else "is finite and")
                + " never negative"
            )
        if self.form == "matrix":
            difference = (tensor - tensor.mT).abs().max()
            if difference > sidecars.ASYMMETRY * size:
                raise self._corrupt(f"{name} is not symmetric")
            if difference > 0:
                tensor = (tensor + tensor.mT) / 2
        return tensor.unsqueeze(-1) if self.form == "diagonal" else tensor

    def _corrupt(self, what: str) -> SidecarError:
        return SidecarError(
            f"the sidecar {self.path} of {self.model} is corrupt: {what}. "
            f"{command_for(self.model, self.kind)} --force"
        )

    def priority(self) -> int:
        """Load late, like the thetas."""
        return -1000

    def group_label(self) -> str:
        """Return the group's label."""
        return self.label


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
        """Return the tasks that load the inputs' factors."""
        return {f"input_{i}": task for i, task in enumerate(self.inputs)}

    def group_label(self) -> str:
        """Return the group's label."""
        return self.label

    def uses_accelerator(self) -> bool:
        """Ask mergekit to move all inputs to the device that computes."""
        return True

    def execute(self, **inputs: torch.Tensor) -> Any:
        """Return what the kind makes of them, on the device that computes."""
        factors = [inputs[f"input_{i}"] for i in range(len(self.inputs))]
        return kind_for(self.kind).common(factors, self.lambdas, **dict(self.options))


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
        arguments: dict[str, Task[Any]] = {f"theta_{i}": t for i, t in enumerate(self.thetas)}
        for i, parts in enumerate(self.precisions):
            arguments |= {f"precision_{i}_{j}": task for j, task in enumerate(parts)}
        arguments |= {f"present_{i}": task for i, task in enumerate(self.present)}
        return arguments if self.shared is None else {**arguments, "shared": self.shared}

    def group_label(self) -> str:
        """Return the output tensor's name, or the label of the layers that share their inputs."""
        return self.label or self.name

    def uses_accelerator(self) -> bool:
        """Ask mergekit to move all inputs to the device that computes."""
        return True

    def execute(self, **inputs: Any) -> torch.Tensor:
        """Return the merged tensor; computed in float32 or better, rounded once.

        Raises:
            CheckpointError: the result is not finite; names the model whose weights are not.
        """
        thetas: list[torch.Tensor] = [inputs[f"theta_{i}"] for i in range(len(self.thetas))]
        precisions = [
            tuple(inputs[f"precision_{i}_{j}"] for j in range(len(parts)))
            for i, parts in enumerate(self.precisions)
        ]
        options = dict(self.options)
        if self.shared is not None:
            options["shared"] = inputs["shared"]
        turned = [theta.mT for theta in thetas] if self.input_axis == -2 else thetas
        stored = functools.reduce(torch.promote_types, (theta.dtype for theta in thetas))
        dtype = dtype_from_name(self.dtype) or stored
        if self.present:
            result = rows.solve(
                self.kind,
                turned,
                [inputs_of for (inputs_of,) in precisions],
                self.lambdas,
                [inputs[f"present_{i}"] >= 0 for i in range(len(self.present))],
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

    def _blame(self, thetas: list[torch.Tensor], dtype: torch.dtype) -> None:
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
        return files.reopen(self.model).convert(self.target, pieces)


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
        if _is_finite(tensor) and not _is_finite(result):
            raise CheckpointError(
                f"{self.name} of {self.theta.model} does not fit into {result.dtype}; choose "
                "another `dtype:`."
            )
        return result


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite: neither end is. `isfinite` takes many times longer."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(end.isfinite() for end in tensor.aminmax())
