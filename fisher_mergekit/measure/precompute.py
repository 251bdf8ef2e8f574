"""The measuring step: one model of a recipe, and its sidecar."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import xxhash

from fisher_mergekit import __version__
from fisher_mergekit.errors import CalibrationError, SidecarError
from fisher_mergekit.measure.batches import Example
from fisher_mergekit.measure.calibration import DEFAULT_EXAMPLES, load_rows
from fisher_mergekit.measure.encoding import encode, fingerprint
from fisher_mergekit.measure.estimators import estimator_for
from fisher_mergekit.measure.likelihoods import likelihood_for
from fisher_mergekit.measure.likelihoods.base import Likelihood
from fisher_mergekit.measure.session import Session
from fisher_mergekit.measure.subject import (
    Subject,
    check_tensors,
    load_subject,
    read_config,
    read_tokenizer,
)
from fisher_mergekit.recipe import Calibration
from fisher_mergekit.sidecar.checkpoint import Checkpoint
from fisher_mergekit.sidecar.header import Header, Measurement, ModelIdentity, Settings
from fisher_mergekit.sidecar.reader import Sidecar
from fisher_mergekit.sidecar.writer import SHARD_SIZE, check_writable, describe, write_sidecar

_SOURCE_KEYS = (
    "path", "name", "split", "data_files", "text", "messages", "label", "shuffle",
)  # fmt: skip
"""Calibration keys that say which data; recorded in the header."""

Progress = Callable[[int, int], Any]
"""Called with the number of examples done in this step, and of all examples."""


@dataclass(frozen=True)
class Job:
    """One model to measure.

    Attributes:
        reference: the model as the user typed it, and its revision.
        folder: its local files.
        present: where its sidecar is read from, if it has one already.
        out: the folder to write its sidecar to.
        kind: what to measure.
        calibration: on what, and how.
    """

    reference: str
    revision: str | None
    folder: Path
    present: Path
    out: Path
    kind: str
    calibration: Calibration
    device: str = "cpu"
    trust_remote_code: bool = False
    shard_size: int = SHARD_SIZE


def existing_sidecar(job: Job) -> Sidecar | None:
    """Return the model's valid sidecar, or None if it has none that a merge could use.

    Raises:
        SidecarError: it is valid, but was measured in another way than the recipe asks for.
    """
    try:
        sidecar = Sidecar(job.present, job.kind)
    except SidecarError:
        return None
    checkpoint = Checkpoint(job.folder)
    names = [name for name in sidecar if name in checkpoint]
    if len(names) != len(sidecar) or sidecar.foreign(checkpoint, names):
        of = sidecar.header.model.reference
        if job.folder not in job.present.parents and of != job.reference:
            raise SidecarError(
                f"{job.present} is the sidecar of other weights, measured as {of}. Give this model "
                "another `sidecar:` (--out), or write over it with --force."
            )
        return None
    differences = _differences(job, sidecar.measurement)
    if differences:
        raise SidecarError(
            f"{job.present} was measured in another way than asked for now: "
            f"{'; '.join(differences)}. "
            "Measure it again with --force, or ask for what is there."
        )
    return sidecar


def _differences(job: Job, measurement: Measurement) -> list[str]:
    """Return where a sidecar's settings are not the ones asked for.

    Without data of its own a model is taken as its author measured it, as long as what must agree
    between models (estimator, unit, length) does.
    """
    asked, settings = job.calibration, measurement.settings
    pairs: dict[str, tuple[Any, Any]] = {
        "unit": (settings.unit, asked.unit),
        "max_length": (settings.max_length, asked.max_length),
    }
    if asked.estimator is not None:
        pairs["estimator"] = (settings.estimator, asked.estimator)
    if asked.path is not None:
        recorded = measurement.calibration
        pairs["examples"] = (settings.examples_requested, asked.examples or DEFAULT_EXAMPLES)
        pairs["seed"] = (settings.seed, asked.seed)
        pairs["mask_prompt"] = (settings.mask_prompt, asked.mask_prompt)
        pairs["sidecar_dtype"] = (settings.dtype, asked.sidecar_dtype)
        pairs["dtype"] = (settings.compute_dtype, asked.dtype)
        source = _source(asked)
        pairs |= {key: (recorded.get(key), source.get(key)) for key in _SOURCE_KEYS}
        if "data" in source:
            pairs["the content of path"] = (recorded.get("data"), source["data"])
    return [f"{key} was {was!r}, now {now!r}" for key, (was, now) in pairs.items() if was != now]


def _source(calibration: Calibration) -> dict[str, Any]:
    """Return which data is meant; `data` is a digest of it where it is a file that is there."""
    source = {
        key: value
        for key, value in calibration.model_dump(mode="json").items()
        if key in _SOURCE_KEYS and value is not None
    }
    if calibration.path is not None and Path(calibration.path).is_file():
        hasher = xxhash.xxh3_128()
        with open(calibration.path, "rb") as file:
            for chunk in iter(lambda: file.read(1 << 20), b""):
                hasher.update(chunk)
        source["data"] = hasher.hexdigest()
    return source


@dataclass(frozen=True)
class Prepared:
    """A job of which everything is read and checked but the model itself.

    Attributes:
        job: what is to be measured.
        tokenizer: the model's own.
        likelihood: what log p(y|x) is for its head.
        estimator: the one asked for, or the likelihood's default.
        examples: the calibration data as the model will see it.
    """

    job: Job
    tokenizer: Any
    likelihood: Likelihood
    estimator: str
    examples: list[Example]


def prepare(job: Job) -> Prepared:
    """Find out all that can be wrong with a job before any model is loaded.

    Raises:
        FisherMergekitError: damaged or incomplete files, an unknown head, an estimator that does
            not fit it, or unusable calibration data.
    """
    calibration = job.calibration
    if job.out.suffix == ".safetensors":
        raise SidecarError(
            f"{job.out} is no valid sidecar, and one file is not what is written: name the folder, "
            f"`sidecar: {job.out.parent}`."
        )
    checkpoint = Checkpoint(job.folder)
    config, architecture = read_config(job.folder, trust_remote_code=job.trust_remote_code)
    likelihood = likelihood_for(architecture)
    estimator = calibration.estimator or likelihood.default_estimator
    likelihood.check(config, estimator)
    check_tensors(config, architecture, checkpoint)
    tokenizer = read_tokenizer(job.folder, trust_remote_code=job.trust_remote_code)
    examples = encode(load_rows(calibration), tokenizer, config, calibration)
    unlabelled = [e.number for e in examples if e.label is None]
    if estimator == "empirical" and likelihood.needs_label and unlabelled:
        remedy = (
            "Name the column: `label: COLUMN` (--label)."
            if calibration.label is None
            else f"Fill its column {calibration.label!r}, or leave out such rows."
        )
        raise CalibrationError(
            f"the empirical estimator needs labels, and example {unlabelled[0]} has none. {remedy}"
        )
    check_writable(job.out)
    return Prepared(job, tokenizer, likelihood, estimator, examples)


def precompute(prepared: Prepared, progress: Progress = lambda done, total: None) -> Header:
    """Measure one model and write its sidecar.

    Returns:
        The header that was written.

    Raises:
        FisherMergekitError: what is wrong, where, and what mends it. Nothing partial is left.
    """
    start = time.perf_counter()
    job, examples = prepared.job, prepared.examples
    calibration = job.calibration
    likelihood, estimator = prepared.likelihood, prepared.estimator
    subject = load_subject(
        job.folder,
        prepared.tokenizer,
        dtype=getattr(torch, calibration.dtype),
        device=job.device,
        trust_remote_code=job.trust_remote_code,
    )
    session = Session(
        model=subject.model,
        likelihood=likelihood,
        estimator=estimator_for(estimator),
        seed=calibration.seed,
        pad_token_id=subject.pad_token_id,
        device=torch.device(job.device),
    )
    progress(0, len(examples))
    fishers = session.run(
        examples, calibration.batch_size, lambda count: progress(count, len(examples))
    )
    dtype = getattr(torch, calibration.sidecar_dtype)
    tensors: dict[str, torch.Tensor] = {}
    written: set[torch.nn.Parameter] = set()
    for name, parameter in sorted_names(subject):
        tensor = fishers[parameter].to("cpu", dtype)
        # Files that hold a tied tensor under two names: safetensors writes no shared memory.
        tensors[name] = tensor.clone() if parameter in written else tensor
        written.add(parameter)
    measurement = Measurement(
        settings=_settings(calibration, likelihood, estimator, [len(e) for e in examples]),
        calibration={**_source(calibration), "fingerprint": fingerprint(examples)},
        weights=subject.weight_records(),
        tensors=describe(tensors),
        unmeasured=subject.unmeasured,
        versions=versions(),
        wall_seconds=round(time.perf_counter() - start, 3),
    )
    identity = ModelIdentity(
        reference=job.reference, revision=job.revision, architecture=subject.architecture
    )
    return write_sidecar(
        job.out, job.kind, identity, measurement, tensors, shard_size=job.shard_size
    )


def sorted_names(subject: Subject) -> list[tuple[str, torch.nn.Parameter]]:
    """Return the measured tensors' names on disk and their parameters, sorted by name."""
    return sorted(subject.names.items(), key=lambda item: item[0])


def _settings(
    calibration: Calibration, likelihood: Likelihood, estimator: str, lengths: list[int]
) -> Settings:
    return Settings(
        estimator=estimator,
        unit=calibration.unit,
        likelihood=likelihood.name,
        examples=len(lengths),
        examples_requested=calibration.examples or DEFAULT_EXAMPLES,
        tokens=sum(lengths),
        max_length=calibration.max_length,
        mask_prompt=calibration.mask_prompt,
        seed=calibration.seed,
        compute_dtype=calibration.dtype,
        dtype=calibration.sidecar_dtype,
    )


def versions() -> dict[str, str]:
    """Return the versions of what the numbers depend on."""
    return {
        "fisher_mergekit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
