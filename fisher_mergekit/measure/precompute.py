"""The measuring step: one model of a recipe, and its sidecar."""

from __future__ import annotations

import platform
import time

import torch
import transformers

from fisher_mergekit import __version__
from fisher_mergekit.errors import SidecarError
from fisher_mergekit.measure.job import Job, source_of
from fisher_mergekit.measure.measured import Measured, need_gradients, needs_of
from fisher_mergekit.measure.sources import Prepared, Progress, adam, data
from fisher_mergekit.measure.stored import stored
from fisher_mergekit.sidecar.header import NONE, Header, Measurement, ModelIdentity
from fisher_mergekit.sidecar.location import FOLDER_NAME
from fisher_mergekit.sidecar.writer import check_writable, describe, write_sidecar


def prepare(job: Job) -> Prepared:
    """Find out all that can be wrong with a job before any model is loaded.

    Raises:
        FisherMergekitError: damaged or incomplete files, an unknown head, an estimator that does
            not fit it, or unusable calibration data.
    """
    if job.out.suffix == ".safetensors":
        folder = job.out.parent
        if (folder / "config.json").is_file():  # a model's own
            folder /= FOLDER_NAME
        raise SidecarError(
            f"{job.out} is no valid sidecar, and one file is not what is written: name the folder, "
            f"`sidecar: {folder}`."
        )
    is_data = job.calibration.optimizer is None
    prepared: Prepared = data.prepare(job) if is_data else adam.prepare(job)
    check_writable(job.out)
    return prepared


def precompute(prepared: Prepared, progress: Progress = lambda done, total: None) -> Header:
    """Measure one model and write its sidecar.

    Returns:
        The header that was written.

    Raises:
        FisherMergekitError: what is wrong, where, and what mends it. Nothing partial is left.
    """
    start = time.perf_counter()
    measured = prepared.measure(progress)
    seconds = round(time.perf_counter() - start, 3)
    kinds = prepared.job.kinds
    for place, kind in enumerate(kinds, start=1):
        measured.later = needs_of(kinds[place:])
        header = _write(prepared.job, kind, measured, seconds)
    return header


def _write(job: Job, kind: str, measured: Measured, seconds: float) -> Header:
    """Write what was measured as one kind of the model's sidecar."""
    subject, settings = measured.subject, measured.settings
    if not need_gradients([kind]):
        none = dict.fromkeys(("estimator", "unit", "likelihood"), NONE)
        settings = settings.model_copy(update={**none, "mask_prompt": False})
    found = stored(kind, measured)
    dtype = getattr(torch, job.calibration.sidecar_dtype)
    tensors = {name: found.tensors.pop(name).to(dtype) for name in sorted(found.tensors)}
    records = subject.weight_records()
    measurement = Measurement(
        settings=settings,
        calibration={**source_of(job.calibration), **measured.origin},
        weights={name: records[name] for name in found.weights},
        tensors=describe(tensors, found.matrices),
        factors=found.factors,
        unmeasured={**subject.unmeasured, **found.undescribed},
        versions=versions(),
        wall_seconds=seconds,
    )
    identity = ModelIdentity(
        reference=job.reference, revision=job.revision, architecture=subject.architecture
    )
    return write_sidecar(
        job.out, kind, identity, measurement, tensors, weights=records, shard_size=job.shard_size
    )


def versions() -> dict[str, str]:
    """Return the versions of what the numbers depend on."""
    return {
        "fisher_mergekit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
