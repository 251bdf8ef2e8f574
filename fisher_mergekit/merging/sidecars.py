"""The sidecars of one merge: found, opened, and checked against their models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache

from fisher_mergekit.errors import SidecarError
from fisher_mergekit.merging.files import Files
from fisher_mergekit.merging.planned import Planned
from fisher_mergekit.merging.remedies import Remedies, Remedy
from fisher_mergekit.recipe import measured_as, parameter_blocks
from fisher_mergekit.sidecar import header
from fisher_mergekit.sidecar.checkpoint import TensorInfo
from fisher_mergekit.sidecar.location import holding, reading_places
from fisher_mergekit.sidecar.reader import Sidecar

COMPARABLE = ("estimator", "unit", "likelihood", "max_length", "mask_prompt")
"""Settings that must agree before two models' precisions may be weighed against each other."""

ASYMMETRY = 1e-3
"""Largest difference of a factor from its transpose, relative to its largest value."""

Key: TypeAlias = tuple[ModelReference, str]
"""A model, and a kind that was measured of it."""
PRIOR_KIND = "prior"
"""The kind of a merge with a prior; also of the base's Fisher among the sidecars, because the base
may be one of the models, too, and has another scale there."""

OPENED = Planned(Sidecar)
"""The sidecars of this merge, by path and kind."""

_REMEDIES: Planned[Remedy | None] = Planned(lambda path, kind: None)
"""What mends them; nothing where nobody planned."""


def remedy_of(path: Path, kind: str) -> str:
    """Return the command that measures again what was opened, or nothing where nobody planned."""
    found = _REMEDIES.again(path, kind)
    return "" if found is None else f" {found.again}"


def open_all(
    names: Mapping[Key, Sequence[str]], files: Files, remedies: Remedies
) -> tuple[dict[Key, Sidecar], list[str]]:
    """Open the sidecars of all models, and check them without loading a precision.

    Args:
        names: by model and kind, the tensors in the model's files that may be merged by it.
        files: each model's tensors.
        remedies: for messages.

    Returns:
        The sidecars that fit their models, by model and kind, and what is wrong.
    """
    opened: dict[Key, Sidecar] = {}
    problems: list[str] = []
    for (model, kind), merged in names.items():
        path = remedies.given.get(model) or place_of(model, files[model].checkpoint.folder, kind)
        remedy = remedies.of(model, kind)
        found, told = open_checked(model, path, kind, files[model], merged, remedy)
        problems += told
        if found is not None:
            opened[model, kind] = found
    return opened, problems


def place_of(model: ModelReference, folder: Path, kind: str) -> Path:
    """Return where a model's sidecar of a kind is, if the recipe does not say.

    Args:
        model: with or without an adapter.
        folder: the model's local files; not asked for with an adapter.
    """
    if model.lora is None:
        places = reading_places(model.model.path, model.model.revision, folder)
        return holding(places, kind)
    adapter = ModelReference(model=model.lora)
    snapshot = Path(adapter.local_path(cache_dir=LoaderCache().hf_cache_dir))
    places = reading_places(model.lora.path, model.lora.revision, snapshot, str(model.model))
    return holding(places, kind)


def given_paths(config: MergeConfiguration) -> tuple[dict[ModelReference, Path], list[str]]:
    """Return the sidecars that the recipe names, and what is wrong with them.

    Args:
        config: the recipe.
    """
    given: dict[ModelReference, Path] = {}
    problems = []
    for block in parameter_blocks(config):
        raw = block.parameters.get("sidecar") if block.is_model else None
        if raw is None:
            continue
        model = measured_as(block.understood.model)
        if not isinstance(raw, str) or not raw:
            problems.append(
                f"sidecar of {model}: expected a folder or a .safetensors file, got {raw!r}."
            )
        elif given.setdefault(model, Path(raw)) != Path(raw):
            problems.append(
                f"sidecar of {model}: {given[model]} in one slice, {raw} in another; a model has "
                "one sidecar."
            )
    spelt = {model: measured_as(model) for model in config.referenced_models()}
    by_spelling = {model: given[one] for model, one in spelt.items() if one in given}
    return by_spelling, list(dict.fromkeys(problems))


def open_checked(
    model: ModelReference,
    path: Path,
    kind: str,
    files: Mapping[str, TensorInfo],
    names: Sequence[str],
    remedy: Remedy,
) -> tuple[Sidecar | None, list[str]]:
    """Open a model's sidecar and check it against the model, without loading a precision.

    Args:
        model: for messages.
        path: the sidecar, a folder or one file.
        kind: which precision.
        files: the model's tensors.
        names: those of them that are to be merged.
        remedy: the command that measures the model, for messages, now and while merging.

    Returns:
        The sidecar, or None if it is of no use; and what is wrong with it.
    """
    _REMEDIES.keep(remedy, path, kind)
    try:
        sidecar = OPENED.anew(path, kind)
    except SidecarError as error:  # missing or damaged
        return None, [f"{model}: {error.message} {remedy.measure}"]
    measured = [name for name in names if name in sidecar.weights]
    unmeasured = sidecar.measurement.unmeasured
    unknown = [n for n in names if n not in sidecar.weights and n not in unmeasured]
    foreign = sidecar.foreign(files, measured)
    stored = list(dict.fromkeys(part for name in measured for part in sidecar.stored(name)))
    records = sidecar.measurement.tensors
    sums = {name: sidecar.sum_of_squares(name) for name in stored}
    impossible = [name for name, value in sums.items() if not (0 <= value < math.inf)]
    lopsided = [name for name in stored if (records[name].asymmetry or 0) > ASYMMETRY]
    problems = []
    if foreign:
        problems.append(
            f"{model}: the sidecar {path} was measured on other weights (digest of {foreign[0]} "
            f"differs{_more(foreign)}). {remedy.measure}"
        )
    if unknown:
        problems.append(
            f"{model}: the sidecar {path} is partial: it says nothing of {unknown[0]}"
            f"{_more(unknown)}. {remedy.again}"
        )
    if impossible:
        problems.append(
            f"{model}: the sidecar {path} is corrupt: the sum of squares of {impossible[0]} is "
            f"{sums[impossible[0]]}{_more(impossible)}. {remedy.again}"
        )
    elif measured and not any(squared_norm(sidecar, name) for name in measured):
        problems.append(
            f"{model}: the {kind} in the sidecar {path} is zero in all {len(measured)} merged "
            "tensors, so the model is sure of nothing. Look at its calibration data, then "
            f"measure again. {remedy.again}"
        )
    if lopsided:
        problems.append(
            f"{model}: the sidecar {path} is corrupt: {lopsided[0]} is not symmetric (it differs "
            f"from its transpose by {records[lopsided[0]].asymmetry:.0e} of its largest value, "
            f"where {ASYMMETRY:.0e} is the limit){_more(lopsided)}. {remedy.again}"
        )
    return (None if problems else sidecar), problems


def parameters(sidecar: Sidecar) -> list[str]:
    """Return the names of all parameters of a sidecar's model: described, or not by this kind."""
    others = sidecar.measurement.unmeasured.items()
    return [*sidecar.weights, *(n for n, why in others if why.startswith(header.NOT_DESCRIBED))]


def squared_norm(sidecar: Sidecar, weight: str) -> float:
    """Return the sum of squares of a weight's precision, from the header alone.

    Of a Kronecker product it is the product of its factors' sums: ‖B ⊗ A‖² = ‖B‖² ‖A‖². Of several
    in one tensor (packed experts) only the totals are known; they count as if they were alike.
    """
    squares = [sidecar.sum_of_squares(name) for name in sidecar.stored(weight)]
    factors = sidecar.measurement.factors.get(weight)
    if factors is None:
        return math.fsum(squares)
    *lead, first, last = sidecar.measurement.weights[weight].shape
    if factors.outputs is None:  # the identity
        return squares[0] * (first if factors.input_axis == -1 else last)
    return math.prod(squares) / math.prod(lead)


def mixed(opened: Mapping[Key, Sidecar], remedy: str) -> list[str]:
    """Say in which respect models that are merged together were measured differently."""
    problems = []
    for key in COMPARABLE:
        values = {k: getattr(sidecar.measurement.settings, key) for k, sidecar in opened.items()}
        if len(set(values.values())) > 1:
            listed = ", ".join(
                f"{value} for {model}{' (the prior)' if kind == PRIOR_KIND else ''}"
                for (model, kind), value in values.items()
            )
            problems.append(
                f"the models were measured with different {key}: {listed}. Such precisions differ "
                f"in scale or meaning. Measure alike ({remedy} --force), or insist with "
                "`allow_mixed: true` under `parameters:`."
            )
    return problems


def _more(names: Sequence[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""
