"""Reading what Adam kept: the second moments in a training checkpoint's `optimizer.pt`.

The file is a pickle. It is opened by PyTorch's restricted reader, which makes tensors, numbers and
containers and nothing else, and is mapped rather than read where its format allows that.
"""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fisher_mergekit.errors import CheckpointError, MeasureError
from fisher_mergekit.sidecar.checkpoint import TensorInfo

FILE_NAME = "optimizer.pt"

_OTHERS = {
    "exp_avg_sq_row": "Adafactor, which keeps sums of rows and columns only",
    "RMS": "Adafactor, which keeps sums of rows and columns only",
    "row_var": "Adafactor, which keeps sums of rows and columns only",
    "variance": "Adafactor, which keeps sums of rows and columns only",
    "state1": "an optimizer of bitsandbytes, most often in 8 bits",
    "exp_inf": "Adamax, which keeps a largest gradient",
    "acc_delta": "Adadelta",
    "square_avg": "RMSprop",
    "sum": "Adagrad",
    "momentum_buffer": "SGD or Muon, which keep no second moment",
    "exp_avg": "Lion, which keeps no second moment",
}
"""Optimizers by a key of their states; the first that is there."""


@dataclass(frozen=True)
class Moment:
    """Adam's running mean of one parameter's squared gradients.

    Attributes:
        values: as stored, in the parameter's shape: beta2 · v + (1 - beta2) · g² after each step.
        step: number of steps.
        beta2: how much of v stays at each step.
    """

    values: Tensor
    step: int
    beta2: float

    def corrected(self) -> Tensor:
        """Return v / (1 - beta2^step) in float32: a mean, whose weights over the steps sum to 1."""
        return self.values.to(torch.float32) / (1 - self.beta2**self.step)


@dataclass(frozen=True)
class ParameterGroup:
    """One of the optimizer's groups of parameters, in its order.

    Attributes:
        moments: one a parameter; None for a parameter that never got a gradient.
        names: the parameters', where the optimizer was given them.
        weight_decay: the group's.
        betas: Adam's two.
        eps: Adam's.
    """

    moments: tuple[Moment | None, ...]
    names: tuple[str, ...] | None
    weight_decay: float
    betas: tuple[float, float]
    eps: float

    def __len__(self) -> int:
        return len(self.moments)


@dataclass(frozen=True)
class AdamState:
    """The whole of an `optimizer.pt` that Adam or AdamW wrote."""

    path: Path
    groups: tuple[ParameterGroup, ...]

    @property
    def steps(self) -> int:
        """The number of steps of the parameter that had most."""
        return max(m.step for group in self.groups for m in group.moments if m is not None)


def find_state(place: Path) -> Path:
    """Return the optimizer's file: `place`, or the one in that folder.

    Raises:
        CheckpointError: there is none.
    """
    path = place / FILE_NAME if place.is_dir() else place
    if path.is_file():
        return path
    if not place.is_dir():
        raise CheckpointError(f"the optimizer's state {place} does not exist.")
    checkpoints = sorted(place.glob(f"checkpoint-*/{FILE_NAME}"), key=lambda p: p.stat().st_mtime)
    if checkpoints:
        hint = f"There is one in {checkpoints[-1].parent}; name that."
    elif any(place.glob("global_step*")) or any(place.glob("optimizer*")):
        hint = (
            "What DeepSpeed or FSDP keep in pieces there is not read; save the optimizer whole "
            f"with torch.save(optimizer.state_dict(), {FILE_NAME!r})."
        )
    else:
        hint = "A Trainer writes it into its checkpoints, unless save_only_model is set."
    raise CheckpointError(f"{place} has no {FILE_NAME}. {hint}")


def identify(place: Path) -> dict[str, str]:
    """Return the state's path, and a digest of the file if it is there: as of a large weight."""
    path = place / FILE_NAME if place.is_dir() else place
    identity = {"optimizer": str(place)}
    if path.is_file():
        size = path.stat().st_size
        identity["data"] = TensorInfo(path.name, path, "U8", (size,), 0, size).digest()
    return identity


def read_state(place: Path) -> AdamState:
    """Open an optimizer's state and check its values.

    Args:
        place: the file, or the folder that it is in.

    Raises:
        CheckpointError: missing, damaged, more than tensors and numbers, or no optimizer's state.
        MeasureError: of another optimizer, or from before the first step.
    """
    path = find_state(place)
    content = _load(path)
    groups = content.get("param_groups") if isinstance(content, Mapping) else None
    states = content.get("state") if isinstance(content, Mapping) else None
    if (
        not isinstance(states, Mapping)
        or not isinstance(groups, list)
        or not all(isinstance(g, Mapping) and isinstance(g.get("params"), list) for g in groups)
        or not all(isinstance(state, Mapping) for state in states.values())
    ):
        raise CheckpointError(
            f"{path} is no optimizer's state: expected the `state` and `param_groups` that "
            "optimizer.state_dict() gives."
        )
    _check_optimizer(path, states, groups)
    ids = [i for group in groups for i in group["params"]]
    if ids != list(range(len(ids))) or not states.keys() <= set(ids):
        # PyTorch numbers the parameters as the groups list them; anything else was put together.
        raise CheckpointError(
            f"{path} does not number its parameters from 0 in the order of its groups, as "
            "optimizer.state_dict() does, so nobody can tell whose states they are."
        )
    try:
        state = AdamState(path, tuple(_group(path, group, states) for group in groups))
    except (TypeError, ValueError) as error:  # what should be a number is none
        raise CheckpointError(f"{path} is no state of Adam's: {error}.") from None
    if not any(moment for group in state.groups for moment in group.moments):
        raise MeasureError(f"{path} was saved before the first step, and has counted nothing yet.")
    return state


def _load(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            start = file.read(2)
        whole = zipfile.is_zipfile(path)
        if start == b"PK" and not whole:
            raise CheckpointError(f"{path} is cut short; copy it again.")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=whole)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"{found.group(1)}, which is neither" if found else "something else, or is damaged"
        raise CheckpointError(
            f"{path} holds more than tensors and numbers: {what}. A pickle can run code, so "
            "nothing more is loaded; save optimizer.state_dict() of a plain Adam or AdamW."
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise CheckpointError(f"{path} is not readable, or is damaged: {reason}.") from None


def _check_optimizer(path: Path, states: Mapping[Any, Any], groups: list[Any]) -> None:
    """Raise MeasureError, which names the optimizer, unless it is Adam's."""
    keys = {key for state in states.values() for key in state}
    betas = [group.get("betas") for group in groups]
    is_adam = {"exp_avg", "exp_avg_sq"} <= keys and all(
        isinstance(pair, tuple | list) and len(pair) == 2 for pair in betas
    )
    foreign = next((name for key, name in _OTHERS.items() if key in keys), None)
    if is_adam:
        return
    if not states:
        found = "is empty: saved before the first step, or of SGD, which keeps nothing"
    elif foreign is not None:
        found = f"is of {foreign}"
    else:
        found = f"keeps {', '.join(sorted(map(str, keys))) or 'nothing'}"
    raise MeasureError(
        f"{path} {found}. Only Adam's and AdamW's exp_avg_sq says how large each gradient was; "
        "measure this model on data instead, `calibration: {path: DATA, text: COLUMN}`."
    )


def _group(path: Path, group: Mapping[str, Any], states: Mapping[Any, Any]) -> ParameterGroup:
    names, beta1, beta2 = group.get("param_names"), *map(float, group["betas"])
    if not 0 <= beta2 < 1:
        raise CheckpointError(f"{path} is damaged: a beta of {beta2}.")
    return ParameterGroup(
        moments=tuple(_moment(path, i, group, states.get(i, {}), beta2) for i in group["params"]),
        names=tuple(map(str, names)) if names is not None else None,
        weight_decay=float(group.get("weight_decay", 0.0)),
        betas=(beta1, beta2),
        eps=float(group.get("eps", 0.0)),
    )


def _moment(
    path: Path, number: int, group: Mapping[str, Any], state: Mapping[str, Any], beta2: float
) -> Moment | None:
    values = state.get("exp_avg_sq")
    step = float(state.get("step", group.get("step", math.nan)))
    if not state or step == 0:
        return None
    if not isinstance(values, Tensor) or not values.is_floating_point() or not step >= 1:
        raise CheckpointError(
            f"{path} is damaged: parameter {number} has the state {', '.join(map(str, state))}, "
            f"after step {step}; expected a tensor exp_avg_sq, and a step of 1 or more."
        )
    if values.numel() and not (values.min() >= 0 and values.max() < math.inf):
        raise MeasureError(
            f"{path}: exp_avg_sq of parameter {number} holds NaN, infinity or negative numbers, "
            "which no square is. The training went wrong; use an earlier checkpoint."
        )
    return Moment(values, int(step), beta2)
