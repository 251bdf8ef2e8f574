"""The measuring step: one model of a recipe, and its sidecar."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from fisher_mergekit import __version__
from fisher_mergekit.errors import CalibrationError, MeasureError, SidecarError
from fisher_mergekit.measure.adapter import check_adapter, read_adapter_config
from fisher_mergekit.measure.batches import Example, used_ids
from fisher_mergekit.measure.calibration import DEFAULT_EXAMPLES, load_rows
from fisher_mergekit.measure.checkpointing import checkpoint_layers
from fisher_mergekit.measure.encoding import Encoder, encode, fingerprint, reads
from fisher_mergekit.measure.estimators import estimator_for
from fisher_mergekit.measure.factors import Factors
from fisher_mergekit.measure.images import read_image_processor
from fisher_mergekit.measure.job import Job, source_of
from fisher_mergekit.measure.likelihoods import likelihood_for
from fisher_mergekit.measure.likelihoods.base import Likelihood
from fisher_mergekit.measure.measured import Measured, need_gradients, needs_of
from fisher_mergekit.measure.session import Session
from fisher_mergekit.measure.sources.adam import PreparedState
from fisher_mergekit.measure.sources.adam import measure as from_state
from fisher_mergekit.measure.sources.adam import prepare as prepare_state
from fisher_mergekit.measure.stored import stored
from fisher_mergekit.measure.subject import (
    Subject,
    check_tensors,
    load_subject,
    read_config,
    read_tokenizer,
)
from fisher_mergekit.measure.units import unit_for
from fisher_mergekit.precision.statistics import INPUTS, OUTPUTS, SQUARES
from fisher_mergekit.sidecar.header import NONE, Header, Measurement, ModelIdentity, Settings
from fisher_mergekit.sidecar.location import FOLDER_NAME
from fisher_mergekit.sidecar.writer import check_writable, describe, write_sidecar

Progress = Callable[[int, int], Any]
"""Called with the number of examples done in this step, and of all examples."""


@dataclass(frozen=True)
class Prepared:
    """A job of which everything is read and checked but the model itself.

    Attributes:
        job: what is to be measured.
        likelihood: what log p(y|x) is for its head.
        estimator: the one asked for, or the likelihood's default.
        examples: the calibration data as the model will see it.
    """

    job: Job
    likelihood: Likelihood
    estimator: str
    examples: list[Example]


def prepare(job: Job) -> Prepared | PreparedState:
    """Find out all that can be wrong with a job before any model is loaded.

    Raises:
        FisherMergekitError: damaged or incomplete files, an unknown head, an estimator that does
            not fit it, or unusable calibration data.
    """
    calibration = job.calibration
    if job.out.suffix == ".safetensors":
        folder = job.out.parent
        if (folder / "config.json").is_file():  # a model's own
            folder /= FOLDER_NAME
        raise SidecarError(
            f"{job.out} is no valid sidecar, and one file is not what is written: name the folder, "
            f"`sidecar: {folder}`."
        )
    if calibration.optimizer is not None:
        return prepare_state(job)
    checkpoint = job.checkpoint()
    config, architecture = _config(job)
    likelihood = likelihood_for(architecture, config)
    estimator = calibration.estimator or likelihood.default_estimator
    likelihood.check(config, calibration.unit)
    if calibration.mask_prompt and not likelihood.has_prompt:
        raise MeasureError(
            f"`mask_prompt` is for language models, and {architecture} scores no prompt anyway. "
            "Leave it out."
        )
    if job.base is None:
        trusted = job.trust_remote_code
        check_tensors(config, architecture, checkpoint, trust_remote_code=trusted)
    else:
        check_adapter(checkpoint)
    encoder = _encoder(job, config, architecture)
    examples = encode(load_rows(calibration), encoder, likelihood)
    if need_gradients(job.kinds):
        estimator_for(estimator).check(likelihood, config, examples, calibration)
    check_writable(job.out)
    return Prepared(job, likelihood, estimator, examples)


def _config(job: Job) -> tuple[Any, str]:
    if job.base is None:
        return read_config(job.folder, trust_remote_code=job.trust_remote_code)
    return read_adapter_config(job.folder, job.base, trust_remote_code=job.trust_remote_code)


def _encoder(job: Job, config: Any, architecture: str) -> Encoder:
    """Return the model's way of reading, if the calibration names what it reads."""
    calibration, main = job.calibration, reads(architecture)
    if main == "input_ids":
        tokenizer = read_tokenizer(job.tokenizer, trust_remote_code=job.trust_remote_code)
        return Encoder(config, calibration, tokenizer=tokenizer)
    if main != "pixel_values":
        raise CalibrationError(
            f"{architecture} reads {main}, which cannot be made of calibration data yet; so far "
            "texts and pictures can."
        )
    if calibration.image is None:
        raise CalibrationError(f"{architecture} reads pictures; name their column, `image:`.")
    processor = read_image_processor(job.tokenizer, trust_remote_code=job.trust_remote_code)
    return Encoder(config, calibration, processor=processor)


def precompute(
    prepared: Prepared | PreparedState, progress: Progress = lambda done, total: None
) -> Header:
    """Measure one model and write its sidecar.

    Returns:
        The header that was written.

    Raises:
        FisherMergekitError: what is wrong, where, and what mends it. Nothing partial is left.
    """
    start = time.perf_counter()
    if isinstance(prepared, PreparedState):
        measured = from_state(prepared)
    else:
        measured = _from_data(prepared, progress)
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


def _from_data(prepared: Prepared, progress: Progress) -> Measured:
    """Measure a model on data."""
    job, examples = prepared.job, prepared.examples
    calibration = job.calibration
    subject = load_subject(
        job.folder,
        used_ids(examples),
        base=job.base,
        dtype=getattr(torch, calibration.dtype),
        attention=calibration.attn_implementation,
        device=job.device,
        trust_remote_code=job.trust_remote_code,
    )
    if calibration.gradient_checkpointing:
        checkpoint_layers(subject.model)
    needs = needs_of(job.kinds)
    session = Session(
        model=subject.model,
        likelihood=prepared.likelihood,
        estimator=estimator_for(prepared.estimator),
        seed=calibration.seed,
        unit=unit_for(calibration.unit),
        pad_token_id=subject.pad_token_id,
        device=torch.device(job.device),
        parameters=subject.measured if SQUARES in needs else (),
        factors=_factors(subject, needs),
    )
    progress(0, len(examples))
    squares = session.run(
        examples, calibration.batch_size, lambda count: progress(count, len(examples))
    )
    return Measured(
        subject,
        squares,
        session.factors,
        settings=_settings(prepared, subject.attention),
        origin={"fingerprint": fingerprint(examples)},
    )


def _factors(subject: Subject, needs: frozenset[str]) -> Factors | None:
    if not needs & {INPUTS, OUTPUTS}:
        return None
    names = {parameter: name for name, parameter in subject.model.named_parameters()}
    own = {parameter: names[parameter] for parameter in subject.measured}
    return Factors(own, outputs=OUTPUTS in needs)


def _settings(prepared: Prepared, attention: str | None) -> Settings:
    calibration, lengths = prepared.job.calibration, [len(e) for e in prepared.examples]
    return Settings(
        estimator=prepared.estimator,
        unit=calibration.unit,
        likelihood=prepared.likelihood.name,
        examples=len(lengths),
        examples_requested=calibration.examples or DEFAULT_EXAMPLES,
        tokens=sum(lengths),
        max_length=calibration.max_length,
        mask_prompt=calibration.mask_prompt,
        seed=calibration.seed,
        compute_dtype=calibration.dtype,
        dtype=calibration.sidecar_dtype,
        attn_implementation=attention,
    )


def versions() -> dict[str, str]:
    """Return the versions of what the numbers depend on."""
    return {
        "fisher_mergekit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
