"""mergekit graph tasks: load a theta, load a precision, merge them, copy what is not merged.

    LoadTheta × n ──┐
                    ├── MergeTask ── (mergekit's SaveTensor or ReturnTensor)
    LoadPrecision × n ┘
    LoadTheta ── CopyTask

The loading tasks are ours, not mergekit's `GatherTensors`, for three reasons: they load under the
very name that was checked; every task of an output tensor bears the *output's* name as its group
label, so that the executor finishes one tensor before the next, also where two models' files call
it differently; and a model that does not count for a tensor is not read for it.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.graph import Task
from mergekit.io.tasks import LoaderCache

from fisher_mergekit.errors import CheckpointError, SidecarError
from fisher_mergekit.merging import files, sidecars
from fisher_mergekit.precision import fisher, solve


class LoadTheta(Task[torch.Tensor]):
    """Load one tensor of one model, in the dtype it is stored in.

    Attributes:
        name: the tensor's name in the model's files; of one that is converted, in memory.
        parts: what it is converted from, by name in the files.
        label: the output tensor's name.
        device: where to read it to; the CPU if None.
    """

    model: ModelReference
    name: str
    label: str
    parts: tuple[str, ...] = ()
    device: str | None = None

    def arguments(self) -> dict[str, Task[Any]]:
        """Return nothing: it depends on files only."""
        return {}

    def execute(self, **_: Any) -> torch.Tensor:
        """Return the tensor as stored; mergekit's loader owns the memory."""
        loader = LoaderCache().get(self.model)

        def load(name: str) -> torch.Tensor:
            tensor: torch.Tensor = loader.get_tensor(name, device=self.device or "cpu")
            return tensor

        if not self.parts:
            return load(self.name)
        return files.reopen(self.model).convert(self.name, {p: load(p) for p in self.parts})

    def priority(self) -> int:
        """Load late, as mergekit's LoadTensor: only when nothing else can be done."""
        return -1000

    def group_label(self) -> str:
        """Return the output tensor's name."""
        return self.label


class LoadPrecision(Task[torch.Tensor]):
    """Load one measured tensor of one model, checked against its checksum.

    Attributes:
        path: the sidecar, a folder or one file.
        kind: which precision.
        name: the tensor's name in the model's files, and so in the sidecar; of one that is
            converted, in memory.
        parts: what it is converted from, by name in the files.
        label: the output tensor's name.
    """

    model: ModelReference
    path: Path
    kind: str
    name: str
    label: str
    parts: tuple[str, ...] = ()

    def arguments(self) -> dict[str, Task[Any]]:
        """Return nothing: it depends on files only."""
        return {}

    def execute(self, **_: Any) -> torch.Tensor:
        """Return the precision on the CPU, finite and non-negative.

        Raises:
            SidecarError: the bytes or the values are not what a measurement can have written.
        """
        if not self.parts:
            return self._load(self.name)
        return files.reopen(self.model).convert(self.name, {p: self._load(p) for p in self.parts})

    def _load(self, name: str) -> torch.Tensor:
        tensor = sidecars.reopen(self.path, self.kind).load(name)
        if tensor.numel():
            # One pass for all three: a NaN anywhere makes both ends NaN.
            lowest, highest = tensor.aminmax()
            if not (lowest >= 0 and highest < torch.inf):
                raise SidecarError(
                    f"the sidecar {self.path} of {self.model} is corrupt: {name} holds "
                    f"values from {lowest.item()} to {highest.item()}, but a {self.kind} is "
                    f"finite and never negative. {sidecars.command_for(self.model)} --force"
                )
        return tensor

    def priority(self) -> int:
        """Load late, like the thetas."""
        return -1000

    def group_label(self) -> str:
        """Return the output tensor's name."""
        return self.label


class MergeTask(Task[torch.Tensor]):
    """Solve Σᵢ λᵢ Cᵢ θ = Σᵢ λᵢ Cᵢ θᵢ for one output tensor.

    Attributes:
        name: the output tensor's name.
        thetas: the models that count here, in the recipe's order.
        precisions: one a theta; none for the identity.
        lambdas: one a theta.
        scales: one a precision: its root mean square over everything that is merged.
        normalize: divide each precision by its own scale.
        floor: relative to the scale.
        favor: index of the theta that gets all of the floor.
        dtype: the result's; None promotes what the thetas are stored in.
    """

    name: str
    thetas: tuple[LoadTheta, ...]
    lambdas: tuple[float, ...]
    precisions: tuple[LoadPrecision, ...] = ()
    scales: tuple[float, ...] = ()
    normalize: bool = True
    floor: float = fisher.FLOOR
    favor: int | None = None
    dtype: str | None = None

    def arguments(self) -> dict[str, Task[Any]]:
        """Return the tasks that load the thetas and their precisions."""
        return {
            **{f"theta_{i}": task for i, task in enumerate(self.thetas)},
            **{f"precision_{i}": task for i, task in enumerate(self.precisions)},
        }

    def group_label(self) -> str:
        """Return the output tensor's name."""
        return self.name

    def uses_accelerator(self) -> bool:
        """Ask mergekit to move all inputs to the device that computes."""
        return True

    def execute(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Return the merged tensor; computed in float32 or better, rounded once.

        Raises:
            CheckpointError: the result is not finite; names the model whose weights are not.
        """
        thetas = [inputs[f"theta_{i}"] for i in range(len(self.thetas))]
        if self.precisions:
            merged = solve(
                "fisher",
                thetas,
                [(inputs[f"precision_{i}"],) for i in range(len(self.precisions))],
                self.lambdas,
                scales=self.scales,
                normalize=self.normalize,
                floor=self.floor,
                favor=self.favor,
            )
        else:
            merged = solve("identity", thetas, [()] * len(thetas), self.lambdas)
        stored = functools.reduce(torch.promote_types, (theta.dtype for theta in thetas))
        result = merged.to(dtype_from_name(self.dtype) or stored)
        if not result.isfinite().all():
            self._blame(thetas, result.dtype)
        return result

    def _blame(self, thetas: list[torch.Tensor], dtype: torch.dtype) -> None:
        """Say whose fault it is that the result is not finite."""
        for task, theta in zip(self.thetas, thetas, strict=True):
            if not theta.isfinite().all():
                raise CheckpointError(
                    f"{task.name} of {task.model} holds NaN or infinite weights, so {self.name} "
                    "cannot be merged. Repair the model, or keep the tensor out with `exclude:`."
                )
        raise CheckpointError(
            f"the merged {self.name} does not fit into {dtype}; choose another `dtype:`."
        )


class CopyTask(Task[torch.Tensor]):
    """Take one output tensor from one model: an excluded tensor, or a buffer that all share.

    Attributes:
        name: the output tensor's name.
        dtype: the dtype to cast to; None keeps it as stored.
    """

    name: str
    theta: LoadTheta
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
        if tensor.isfinite().all() and not result.isfinite().all():
            raise CheckpointError(
                f"{self.name} of {self.theta.model} does not fit into {result.dtype}; choose "
                "another `dtype:`."
            )
        return result
