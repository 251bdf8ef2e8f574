"""Calibration data: each example's gradient, as the model in front of it has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fisher_mergekit.errors import CalibrationError, MeasureError
from fisher_mergekit.measure.adapter import check_adapter, read_adapter_config
from fisher_mergekit.measure.batches import Example, used_ids
from fisher_mergekit.measure.calibration import DEFAULT_EXAMPLES, load_rows
from fisher_mergekit.measure.checkpointing import checkpoint_layers
from fisher_mergekit.measure.encoding import Encoder, encode, fingerprint, reads
from fisher_mergekit.measure.estimators import estimator_for
from fisher_mergekit.measure.factors import Factors
from fisher_mergekit.measure.images import read_image_processor
from fisher_mergekit.measure.job import Job
from fisher_mergekit.measure.likelihoods import likelihood_for
from fisher_mergekit.measure.likelihoods.base import Likelihood
from fisher_mergekit.measure.measured import Measured, need_gradients, needs_of
from fisher_mergekit.measure.session import Session
from fisher_mergekit.measure.sources import Progress
from fisher_mergekit.measure.subject import (
    Subject,
    check_tensors,
    load_subject,
    read_config,
    read_tokenizer,
)
from fisher_mergekit.measure.units import unit_for
from fisher_mergekit.precision.statistics import INPUTS, OUTPUTS, SQUARES
from fisher_mergekit.sidecar.header import Settings


@dataclass(frozen=True)
class PreparedData:
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

    def measure(self, progress: Progress) -> Measured:
        """Measure a model on data.

        Raises:
            FisherMergekitError: the model cannot be loaded or measured, or gives nothing finite.
        """
        job, examples = self.job, self.examples
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
            likelihood=self.likelihood,
            estimator=estimator_for(self.estimator),
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
            settings=self._settings(subject.attention),
            origin={"fingerprint": fingerprint(examples)},
        )

    def _settings(self, attention: str | None) -> Settings:
        calibration, lengths = self.job.calibration, [len(e) for e in self.examples]
        return Settings(
            estimator=self.estimator,
            unit=calibration.unit,
            likelihood=self.likelihood.name,
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


def prepare(job: Job) -> PreparedData:
    """Find out all that can be wrong before any model is loaded.

    Raises:
        FisherMergekitError: damaged or incomplete files, an unknown head, an estimator that does
            not fit it, or unusable calibration data.
    """
    calibration = job.calibration
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
    return PreparedData(job, likelihood, estimator, examples)


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


def _factors(subject: Subject, needs: frozenset[str]) -> Factors | None:
    if not needs & {INPUTS, OUTPUTS}:
        return None
    names = {parameter: name for name, parameter in subject.model.named_parameters()}
    own = {parameter: names[parameter] for parameter in subject.measured}
    return Factors(own, outputs=OUTPUTS in needs)
