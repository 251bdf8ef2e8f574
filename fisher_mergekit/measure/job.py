"""What is asked for: one model to measure, and whether it has been measured already."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from fisher_mergekit.errors import MeasureError, SidecarError
from fisher_mergekit.measure.adapter import ADAPTER_STEM
from fisher_mergekit.measure.calibration import DEFAULT_EXAMPLES
from fisher_mergekit.measure.measured import need_gradients
from fisher_mergekit.measure.sources.optimizer import identify
from fisher_mergekit.recipe import Calibration
from fisher_mergekit.sidecar.checkpoint import Checkpoint
from fisher_mergekit.sidecar.header import Measurement
from fisher_mergekit.sidecar.location import holding
from fisher_mergekit.sidecar.reader import Sidecar
from fisher_mergekit.sidecar.writer import SHARD_SIZE

_SOURCE_KEYS = (
    "path", "name", "split", "data_files", "text", "messages", "image", "choices", "label",
    "shuffle", "optimizer",
)  # fmt: skip
"""Calibration keys that say which data; recorded in the header. `streaming` is one where examples
are drawn: those of a stream come from the library's buffer."""


OF_GRADIENTS = ("estimator", "unit", "mask_prompt")
"""Settings that say nothing of a kind without gradients."""


@dataclass(frozen=True)
class Job:
    """One model to measure.

    Attributes:
        reference: the model as the user typed it, and its revision.
        folder: its local files.
        tokenizer: the folder of its tokenizer or image processor.
        base: if it is an adapter alone, the local files of the model that it was trained on.
        present: where its sidecars are read from, if it has some already.
        out: the folder to write its sidecar to.
        kinds: what to measure, in one pass.
        calibration: on what, and how.
    """

    reference: str
    revision: str | None
    folder: Path
    tokenizer: Path
    present: tuple[Path, ...]
    out: Path
    kinds: tuple[str, ...]
    calibration: Calibration
    base: Path | None = None
    device: str = "cpu"
    trust_remote_code: bool = False
    shard_size: int = SHARD_SIZE

    def checkpoint(self) -> Checkpoint:
        """Open the files whose tensors are measured."""
        return Checkpoint(self.folder, "model" if self.base is None else ADAPTER_STEM)


def missing_kinds(job: Job) -> tuple[str, ...]:
    """Return the kinds of which the model has no valid sidecar.

    Raises:
        SidecarError: there is a valid one that was measured in another way than asked for.
        MeasureError: a kind that an optimizer does not keep.
    """
    check_state_kinds(job)
    return tuple(kind for kind in job.kinds if existing_sidecar(job, kind) is None)


def check_state_kinds(job: Job) -> None:
    """Raise MeasureError for a kind that is asked of an optimizer's state, which has but one."""
    others = [kind for kind in job.kinds if kind != "fisher"]
    if job.calibration.optimizer is not None and others:
        raise MeasureError(
            f"an optimizer's state has no {others[0]}: Adam keeps one number a parameter, a "
            "diagonal. Measure this model on data, or merge with `merge_method: fisher`."
        )


def existing_sidecar(job: Job, kind: str) -> Sidecar | None:
    """Return the model's valid sidecar of a kind, or None if a merge could not use what is there.

    Raises:
        SidecarError: it is valid, but was measured in another way than the recipe asks for.
    """
    present = holding(job.present, kind)
    try:
        sidecar = Sidecar(present, kind)
    except SidecarError:
        return None
    checkpoint = job.checkpoint()
    names = [name for name in sidecar.weights if name in checkpoint]
    if len(names) != len(sidecar.weights) or sidecar.foreign(checkpoint, names):
        of = sidecar.header.model.reference
        if job.folder not in present.parents and of != job.reference:
            raise SidecarError(
                f"{present} is the sidecar of other weights, measured as {of}. Give this model "
                "another `sidecar:` (--out), or write over it with --force."
            )
        return None
    differences = _differences(job, kind, sidecar.measurement)
    if differences:
        raise SidecarError(
            f"{present} was measured in another way than asked for now: "
            f"{'; '.join(differences)}. "
            "Measure it again with --force, or ask for what is there."
        )
    return sidecar


def _differences(job: Job, kind: str, measurement: Measurement) -> list[str]:
    """Return where a sidecar's settings are not the ones asked for.

    A model for which no data is named is taken as its author measured it; then only what the user
    asked for explicitly counts.
    """
    asked, settings, recorded = job.calibration, measurement.settings, measurement.calibration
    source = source_of(asked)
    pairs: dict[str, tuple[Any, Any]] = {
        "sidecar_dtype": (settings.dtype, asked.sidecar_dtype),
        **{key: (recorded.get(key), source.get(key)) for key in (*_SOURCE_KEYS, "streaming")},
    }
    if asked.optimizer is None:  # whose state is what it is
        pairs |= {
            "estimator": (settings.estimator, asked.estimator or settings.estimator),
            "unit": (settings.unit, asked.unit),
            "max_length": (settings.max_length, asked.max_length),
            "examples": (settings.examples_requested, asked.examples or DEFAULT_EXAMPLES),
            "seed": (settings.seed, asked.seed),
            "mask_prompt": (settings.mask_prompt, asked.mask_prompt),
            "dtype": (settings.compute_dtype, asked.dtype),
        }
    was_state, is_state = recorded.get("optimizer"), asked.optimizer
    if (was_state is None) != (is_state is None) and (is_state or asked.path):
        of = ["data" if state is None else f"an optimizer's state, {state}" for state in
              (was_state, is_state)]  # fmt: skip
        return [f"it was taken from {of[0]}, now from {of[1]}"]
    if "data" in source:
        where = "path" if asked.optimizer is None else "optimizer"
        pairs[f"the content of {where}"] = (recorded.get("data"), source["data"])
    if not need_gradients([kind]):
        pairs = {key: pair for key, pair in pairs.items() if key not in OF_GRADIENTS}
    if asked.path is None and asked.optimizer is None:
        pairs = {key: pair for key, pair in pairs.items() if key in asked.model_fields_set}
    return [f"{key} was {was!r}, now {now!r}" for key, (was, now) in pairs.items() if was != now]


def source_of(calibration: Calibration) -> dict[str, Any]:
    """Return which data is meant; `data` is a digest of it where it is a file that is there."""
    if calibration.optimizer is not None:
        return identify(Path(calibration.optimizer))
    source = {
        key: value
        for key, value in calibration.model_dump(mode="json").items()
        if key in _SOURCE_KEYS and value is not None
    }
    if calibration.shuffle and calibration.streaming:
        source["streaming"] = True
    if calibration.path is not None:
        source["path"] = str(Path(calibration.path))  # ./x and x are one file
    if calibration.path is not None and Path(calibration.path).is_file():
        hasher = xxhash.xxh3_128()
        with open(calibration.path, "rb") as file:
            for chunk in iter(lambda: file.read(1 << 20), b""):
                hasher.update(chunk)
        source["data"] = hasher.hexdigest()
    return source
