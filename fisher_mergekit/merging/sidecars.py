"""Each model's sidecar, for one merge: where it is, whether it fits, and its scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache

from fisher_mergekit.errors import SidecarError, SidecarMissing
from fisher_mergekit.merging.files import Files, Stored
from fisher_mergekit.merging.settings import TensorSettings
from fisher_mergekit.merging.slots import Slot
from fisher_mergekit.precision.fisher import root_mean_square
from fisher_mergekit.sidecar import header
from fisher_mergekit.sidecar.checkpoint import TensorInfo
from fisher_mergekit.sidecar.location import reading_place
from fisher_mergekit.sidecar.reader import Sidecar

MEASURE = "Run: mergekit-fisher precompute"

COMPARABLE = ("estimator", "unit", "likelihood", "max_length", "mask_prompt")
"""Settings that must agree before two models' precisions may be weighed against each other."""

_opened: dict[tuple[Path, str], Sidecar] = {}


@dataclass(frozen=True)
class ModelSidecar:
    """A sidecar that fits its model.

    Attributes:
        scale: root mean square of the precision over everything that is merged; 1 if the sidecar
            describes nothing of it.
    """

    sidecar: Sidecar
    scale: float

    def describes(self, tensor: Stored) -> bool:
        """Whether a tensor of the model, or all that it is made of, was measured."""
        return all(part.name in self.sidecar for part in tensor.parts)


def open_anew(path: Path, kind: str) -> Sidecar:
    """Open a sidecar as it is on disk now; the tasks of this merge will read from it.

    Raises:
        SidecarError: missing, partial or damaged.
    """
    sidecar = Sidecar(path, kind)
    _opened[path, kind] = sidecar
    return sidecar


def reopen(path: Path, kind: str) -> Sidecar:
    """Return the sidecar that was opened in planning, or open it in a process that did not plan."""
    return _opened.get((path, kind)) or open_anew(path, kind)


def open_all(
    merged: Sequence[Slot],
    resolved: Mapping[str, TensorSettings],
    config: MergeConfiguration,
    kind: str,
    files: Files,
    *,
    one_by_one: bool = False,
) -> tuple[dict[ModelReference, ModelSidecar], list[str]]:
    """Open and check the sidecars of all models that count somewhere.

    Args:
        merged: the merged output tensors, complete.
        resolved: the settings of each, by name.
        config: the recipe, in mergekit's normal form.
        kind: which precision.
        files: each model's tensors.
        one_by_one: whether the recipe is one that `precompute` cannot read as a whole.

    Returns:
        The sidecars that fit their models, and what is wrong.
    """
    given, problems = given_paths(config)
    opened: dict[ModelReference, ModelSidecar] = {}
    counting = {s.sources[i].model: None for s in merged for i in resolved[s.name].counting}
    for model in counting:
        path = given.get(model) or place_of(model, files[model].checkpoint.folder)
        # A source that several outputs share is one tensor of the model, and counts once. The scale
        # is that of the tensors in the files, whatever is made of them.
        sources = [source for s in merged for source in s.sources if source.model == model]
        names = dict.fromkeys(part.name for source in sources for part in source.tensor.parts)
        twins = {source.tensor.name: tuple(source.weight.tied_names or ()) for source in sources}
        remedy = command_for(model, given.get(model), one_by_one=one_by_one)
        found, told = open_checked(model, path, kind, files[model], list(names), twins, remedy)
        problems += told
        if found is not None:
            opened[model] = found
    if not all(settings.options.get("allow_mixed") for settings in resolved.values()):
        problems += mixed(
            {m: found.sidecar.measurement.settings for m, found in opened.items()},
            f"{MEASURE} --model MODEL --path DATA" if one_by_one else f"{MEASURE} RECIPE",
        )
    if len(opened) == len(counting):
        problems += half_measured(merged, resolved, opened)
    return opened, problems


def place_of(model: ModelReference, folder: Path) -> Path:
    """Return where a model's sidecar is, if the recipe does not say.

    Args:
        model: with or without an adapter.
        folder: the model's local files; not asked for with an adapter.
    """
    if model.lora is None:
        return reading_place(model.model.path, model.model.revision, folder)
    adapter = ModelReference(model=model.lora)
    snapshot = Path(adapter.local_path(cache_dir=LoaderCache().hf_cache_dir))
    return reading_place(model.lora.path, model.lora.revision, snapshot, str(model.model))


def given_paths(config: MergeConfiguration) -> tuple[dict[ModelReference, Path], list[str]]:
    """Return the sidecars that the recipe names, and what is wrong with them.

    Args:
        config: a recipe in mergekit's normal form, in which all models stand in slices.
    """
    given: dict[ModelReference, Path] = {}
    problems = []
    for module in (config.modules or {}).values():
        for source in (source for piece in module.slices or () for source in piece.sources):
            raw = (source.parameters or {}).get("sidecar")
            if raw is None:
                continue
            if not isinstance(raw, str) or not raw:
                problems.append(
                    f"sidecar of {source.model}: expected a folder or a .safetensors file, "
                    f"got {raw!r}."
                )
            elif given.setdefault(source.model, Path(raw)) != Path(raw):
                problems.append(
                    f"sidecar of {source.model}: {given[source.model]} in one slice, {raw} in "
                    "another; a model has one sidecar."
                )
    return given, list(dict.fromkeys(problems))


def open_checked(
    model: ModelReference,
    path: Path,
    kind: str,
    files: Mapping[str, TensorInfo],
    names: Sequence[str],
    twins: Mapping[str, Sequence[str]],
    remedy: str,
) -> tuple[ModelSidecar | None, list[str]]:
    """Open a model's sidecar and check it against the model, without loading a precision.

    Args:
        model: for messages.
        path: the sidecar, a folder or one file.
        kind: which precision.
        files: the model's tensors.
        names: those of them that are to be merged.
        twins: what each of these may be tied to. Files that hold one parameter under two names
            must give the scale of files that hold it once.
        remedy: the command that measures the model, for messages.

    Returns:
        The sidecar, or None if it is of no use; and what is wrong with it.
    """
    try:
        sidecar = open_anew(path, kind)
    except SidecarMissing as error:
        return None, [f"{model}: {error.message} {remedy}"]
    except SidecarError as error:
        return None, [f"{model}: {error.message} {remedy} --force"]
    measured = [name for name in names if name in sidecar]
    unmeasured = sidecar.measurement.unmeasured
    unknown = [name for name in names if name not in sidecar and name not in unmeasured]
    foreign = sidecar.foreign(files, measured)
    sums = {name: sidecar.sum_of_squares(name) for name in measured}
    impossible = [name for name, value in sums.items() if not (0 <= value < math.inf)]
    problems = []
    if foreign:
        problems.append(
            f"{model}: the sidecar {path} was measured on other weights (digest of {foreign[0]} "
            f"differs{_more(foreign)}). {remedy} --force"
        )
    if unknown:
        problems.append(
            f"{model}: the sidecar {path} is partial: it says nothing of {unknown[0]}"
            f"{_more(unknown)}. {remedy} --force"
        )
    if impossible:
        problems.append(
            f"{model}: the sidecar {path} is corrupt: the sum of squares of {impossible[0]} is "
            f"{sums[impossible[0]]}{_more(impossible)}. {remedy} --force"
        )
    elif measured and not any(sums.values()):
        problems.append(
            f"{model}: the {kind} in the sidecar {path} is zero in all {len(measured)} merged "
            "tensors, so the model is sure of nothing. Look at its calibration data, then "
            f"measure again. {remedy} --force"
        )
    if problems:
        return None, problems
    records = sidecar.measurement.tensors
    again = {
        name
        for name in measured
        for twin in twins.get(name, ())
        if twin in sums and twin != name and records[twin].checksum == records[name].checksum
    }
    once = [name for name in measured if name not in again]
    count = sum(sidecar[name].count for name in once)
    total = math.fsum(sums[name] for name in once)
    return ModelSidecar(sidecar, root_mean_square(total, count) if measured else 1.0), []


def command_for(model: ModelReference, out: Path | None = None, *, one_by_one: bool = True) -> str:
    """Return the sentence with the command that measures a model, by itself or with its recipe."""
    cache = f" --lora-merge-cache {LoaderCache().lora_cache_dir}" if model.lora is not None else ""
    if not one_by_one:
        return f"{MEASURE} RECIPE{cache}"
    place = f" --out {out}" if out is not None else ""
    return f"{MEASURE} --model {model}{place}{cache} --path DATA --text COLUMN"


def mixed(settings: Mapping[ModelReference, header.Settings], remedy: str) -> list[str]:
    """Say in which respect the models were measured differently, if in any."""
    problems = []
    for key in COMPARABLE:
        values = {str(model): getattr(s, key) for model, s in settings.items()}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{value} for {model}" for model, value in values.items())
            problems.append(
                f"the models were measured with different {key}: {listed}. Such precisions differ "
                f"in scale or meaning. Measure alike ({remedy} --force), or insist with "
                "`allow_mixed: true` under `parameters:`."
            )
    return problems


def half_measured(
    merged: Sequence[Slot],
    resolved: Mapping[str, TensorSettings],
    opened: Mapping[ModelReference, ModelSidecar],
) -> list[str]:
    """Say which tensors are a parameter of one model and none of another, if any."""
    problems = []
    for slot in merged:
        parts = [slot.sources[i] for i in resolved[slot.name].counting]
        having = [s for s in parts if opened[s.model].describes(s.tensor)]
        lacking = [s for s in parts if s not in having]
        if having and lacking:
            problems.append(
                f"{slot.name} was measured in {having[0].model}, but in {lacking[0].model} it is "
                "no parameter and was not. Keep it out with `exclude:`."
            )
    return problems


def _more(names: Sequence[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""
