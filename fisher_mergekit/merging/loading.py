"""mergekit graph tasks that load: thetas and precisions, as checked at planning.

They are ours, not mergekit's `GatherTensors`, for three reasons: they load under the very name that
was checked; every task of an output tensor has the *output's* name in its group label, so that the
executor finishes one tensor before the next, also where two models' files call it differently; and
a model that does not count for a tensor is not read for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from mergekit.common import ModelReference
from mergekit.graph import Task

from fisher_mergekit.errors import SidecarError
from fisher_mergekit.merging import files, sidecars
from fisher_mergekit.merging.side_by_side import side_by_side


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
        """Return the tensor as stored, mapped into memory."""
        held = files.OPENED.again(self.model)

        def load(name: str) -> torch.Tensor:
            return held.checkpoint.load(name, self.device or "cpu")

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
        return self.made_of(self.read())

    def read(self) -> dict[str, tuple[torch.Tensor, bool]]:
        """Read what it is made of, by name, each with whether no value is odd; from any thread.

        Raises:
            SidecarError: the bytes are not those that were written.
        """
        sidecar = sidecars.OPENED.again(self.path, self.kind)
        try:
            return {name: sidecar.load_scanned(name) for name in self.parts or (self.name,)}
        except SidecarError as error:
            raise SidecarError(error.message + self._remedy) from error

    def made_of(self, read: dict[str, tuple[torch.Tensor, bool]]) -> torch.Tensor:
        """Return the precision that is made of what was read.

        Raises:
            SidecarError: the values are not what a measurement can have written.
        """
        tensors = {name: self._fit(name, *found) for name, found in read.items()}
        if not self.parts:
            return tensors[self.name]
        return files.OPENED.again(self.model).convert(self.name, tensors)

    def _fit(self, name: str, tensor: torch.Tensor, is_plain: bool) -> torch.Tensor:
        if tensor.numel() and (self.form == "matrix" or not is_plain):
            tensor = self._checked(name, tensor)
        return tensor.unsqueeze(-1) if self.form == "diagonal" else tensor

    def _checked(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        # One pass for both: a NaN anywhere makes both ends NaN.
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
        return tensor

    def _corrupt(self, what: str) -> SidecarError:
        return SidecarError(
            f"the sidecar {self.path} of {self.model} is corrupt: {what}.{self._remedy}"
        )

    @property
    def _remedy(self) -> str:
        return sidecars.remedy_of(self.path, self.kind)

    def priority(self) -> int:
        """Load late, like the thetas."""
        return -1000

    def group_label(self) -> str:
        """Return the group's label."""
        return self.label


class Together(Task[tuple[torch.Tensor, ...]]):
    """Several tensors as one task.

    After each task mergekit's executor looks through all targets and all values that it holds, so
    what a merge of many small models costs is the number of tasks.

    Attributes:
        tasks: what gives the tensors. Those that depend on nothing are done here.
    """

    tasks: tuple[Task[torch.Tensor], ...]

    def arguments(self) -> dict[str, Task[Any]]:
        """Return the tasks that depend on others."""
        return {str(i): task for i, task in enumerate(self.tasks) if task.arguments()}

    def execute(self, **made: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the tensors."""
        loads = {}
        for i, task in enumerate(self.tasks):
            if isinstance(task, LoadPrecision):
                loads[i] = task
            elif str(i) not in made:  # now, so that the disk reads it during what follows
                made[str(i)] = task.execute()
        # Only reading: what is computed has torch's threads, and memory for one at a time.
        read = side_by_side([task.read for task in loads.values()])
        for (i, task), content in zip(loads.items(), read, strict=True):
            made[str(i)] = task.made_of(content)
        return tuple(made[str(i)] for i in range(len(self.tasks)))

    def priority(self) -> int:
        """Load late."""
        return -1000

    def group_label(self) -> str | None:
        """Return the label of the first."""
        label: str | None = self.tasks[0].group_label()
        return label
