"""Adam's second moment as a diagonal Fisher: no data, no pass, for who trained the model.

Adam keeps a running mean v of each parameter's squared gradient. The gradient is that of a
mini-batch's mean loss, clipped if the training clipped it, so v is no Fisher: it has the terms
between different examples of a batch, and is about 1/B of a Fisher where those cancel. A merge
divides each model's values by their scale, which makes factors irrelevant; in experiments v serves
about as well (Li et al. 2025, "Fishers for Free? Approximating the Fisher Information Matrix by
Recycling the Squared Gradient Accumulator", arXiv 2507.18807).
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fisher_mergekit.errors import MeasureError
from fisher_mergekit.measure.job import Job, check_state_kinds
from fisher_mergekit.measure.likelihoods import likelihood_for
from fisher_mergekit.measure.likelihoods.base import Likelihood
from fisher_mergekit.measure.measured import Measured
from fisher_mergekit.measure.sources import Progress
from fisher_mergekit.measure.sources.optimizer import AdamState, Moment, find_state, read_state
from fisher_mergekit.measure.sources.order import assign
from fisher_mergekit.measure.subject import (
    Subject,
    check_tensors,
    load_subject,
    outline,
    read_config,
)
from fisher_mergekit.sidecar.checkpoint import Checkpoint
from fisher_mergekit.sidecar.header import Settings

LOG = logging.getLogger(__name__)

ESTIMATOR = "adam"
UNIT = "batch"
_NO_STATE = "no state in the optimizer: frozen in training, or without influence on the loss"


@dataclass(frozen=True)
class PreparedState:
    """An optimizer's state that was seen to belong to a model.

    Attributes:
        job: whose precision it is to become.
        likelihood: what log p(y|x) is for the model's head.
        state: the optimizer's.
    """

    job: Job
    likelihood: Likelihood
    state: AdamState

    def measure(self, progress: Progress) -> Measured:
        """Turn the state into a diagonal of the model's precision, in float32.

        Raises:
            FisherMergekitError: the model cannot be loaded, or holds other parameters.
        """
        job, state = self.job, self.state
        config, _ = read_config(job.folder, trust_remote_code=job.trust_remote_code)
        stored = getattr(config, "dtype", None)
        subject = load_subject(
            job.folder,
            dtype=stored if isinstance(stored, torch.dtype) else torch.float32,
            trust_remote_code=job.trust_remote_code,
        )
        moments = {n: m for n, m in assign(state, subject.model).items() if m is not None}
        subject = _trained(subject, moments)
        parameters = dict(subject.model.named_parameters())
        values = {parameters[name]: moment.corrected() for name, moment in moments.items()}
        settings = Settings(
            estimator=ESTIMATOR,
            unit=UNIT,
            likelihood=self.likelihood.name,
            compute_dtype=str(next(iter(moments.values())).values.dtype).removeprefix("torch."),
            dtype=job.calibration.sidecar_dtype,
        )
        return Measured(subject, values, None, settings, _origin(state, config))


def prepare(job: Job) -> PreparedState:
    """Find out all that can be wrong, before any model is loaded.

    Raises:
        FisherMergekitError: files that are missing, damaged, or do not belong together, another
            optimizer, an unknown head, or a kind that Adam does not keep.
    """
    check_state_kinds(job)
    if job.base is not None:
        raise MeasureError(
            f"{job.folder} is an adapter alone; an optimizer's state is read for whole models "
            "only. Measure the adapter on data."
        )
    checkpoint = job.checkpoint()
    trusted = job.trust_remote_code
    config, architecture = read_config(job.folder, trust_remote_code=trusted)
    likelihood = likelihood_for(architecture, config)
    check_tensors(config, architecture, checkpoint, trust_remote_code=trusted)
    place = Path(job.calibration.optimizer or "")
    _check_weights(find_state(place), checkpoint)
    state = read_state(place)
    model = outline(config, architecture, trust_remote_code=trusted)
    if model is not None:
        assign(state, model)
    return PreparedState(job, likelihood, state)


def _check_weights(path: Path, checkpoint: Checkpoint) -> None:
    """Raise MeasureError if other weights stand beside the optimizer's state than the model's.

    Shapes alone would let the optimizer of another fine-tuning of the same model pass.
    """
    if not any(path.parent.glob("model*.safetensors*")):
        return
    beside = Checkpoint(path.parent)
    differ = [
        name
        for name, info in checkpoint.items()
        if name not in beside or beside[name].digest() != info.digest()
    ]
    if differ:
        raise MeasureError(
            f"{path} belongs to the weights beside it, and {checkpoint.folder} holds others "
            f"({differ[0]} differs{f', and {len(differ) - 1} more' if differ[1:] else ''}). Name "
            f"that checkpoint as the model, {path.parent}, or the optimizer of this one. To use "
            "it all the same, name a copy that stands alone."
        )


def _trained(subject: Subject, moments: dict[str, Moment]) -> Subject:
    """Return the subject with only those tensors measured of which the optimizer has a state."""
    owners = {id(p): name for name, p in subject.model.named_parameters()}
    parameters = dict(subject.model.named_parameters(remove_duplicate=False))
    known = {
        group: all(owners[id(parameters[name])] in moments for name in group.targets)
        for group in subject.groups
    }
    left = [source for group, is_known in known.items() if not is_known for source in group.sources]
    if left:
        whole = sum(source.count for group in subject.groups for source in group.sources)
        share = sum(source.count for source in left) / whole
        LOG.warning(
            "%s: the optimizer has no state of %d tensors (%s …), %.1f %% of the model. They were "
            "frozen or unused in training; a merge takes their lambda-weighted mean.",
            subject.checkpoint.folder, len(left), left[0].name, 100 * share,
        )  # fmt: skip
    return replace(
        subject,
        groups=tuple(group for group, is_known in known.items() if is_known),
        unmeasured=subject.unmeasured | {source.name: _NO_STATE for source in left},
    )


def _origin(state: AdamState, config: Any) -> dict[str, Any]:
    """Return what is known of the training: from the optimizer, and from what stands beside it."""
    first = state.groups[0]
    origin = {
        "steps": state.steps,
        "betas": list(first.betas),
        "eps": first.eps,
        "weight_decay": [group.weight_decay for group in state.groups],
        "saved_with": getattr(config, "transformers_version", None),
        "batch_size_per_device": _batch_size(state),
    }
    return {key: value for key, value in origin.items() if value is not None}


def _batch_size(state: AdamState) -> int | None:
    """Return the Trainer's batch size on each device, if its own notes are there and of this step.

    How many devices there were, and how many batches made one step, they do not say.
    """
    try:
        notes = json.loads((state.path.parent / "trainer_state.json").read_text(encoding="utf-8"))
        size = notes["train_batch_size"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return size if isinstance(size, int) and notes.get("global_step") == state.steps else None
