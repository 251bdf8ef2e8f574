"""The base model's own Fisher as a prior: its tensors and its sidecar (`prior: true`)."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from mergekit.config import MergeConfiguration

from fisher_mergekit.errors import some
from fisher_mergekit.merging import sidecars
from fisher_mergekit.merging.files import Files
from fisher_mergekit.merging.remedies import Remedies, by_itself
from fisher_mergekit.merging.settings import TensorSettings
from fisher_mergekit.merging.slots import Slot, Source, part_names
from fisher_mergekit.methods import PRIOR, PRIOR_SIDECAR
from fisher_mergekit.sidecar.reader import Sidecar

LOG = logging.getLogger(__name__)

KIND = "fisher"
"""What is measured of the base; the kind of the merge is `prior`."""


def base_sources(
    merged: Sequence[Slot],
    resolved: Mapping[str, TensorSettings],
    config: MergeConfiguration,
    files: Files,
) -> tuple[dict[str, Source], list[str]]:
    """Find the base's tensor that each output's models began as.

    Args:
        merged: the merged output tensors, complete.
        resolved: the settings of each, by name.
        config: the recipe.
        files: every model's tensors.

    Returns:
        The base's tensors by the output's name, where the recipe wants a prior; and what is wrong.
    """
    wanted = [slot for slot in merged if resolved[slot.name].options.get(PRIOR.name)]
    base = config.base_model
    problems: list[str] = []
    if not wanted:
        if (config.parameters or {}).get(PRIOR_SIDECAR.name):
            problems.append(
                "`prior_sidecar:` has no effect without `prior: true`. Add that, or remove it."
            )
        return {}, problems
    if base is None:
        return {}, [
            "`prior: true` takes base_model's own Fisher as a prior, and the recipe names none. "
            "Add `base_model:` at the top, with the model that all were trained from."
        ]
    if any(resolved[slot.name].options.get("favor_base") for slot in wanted):
        problems.append(
            "`favor_base` and `prior` both say what the base counts where nobody knows anything. "
            "Keep one of the two."
        )
    _warn_of_shares(wanted, resolved)
    if base not in files:
        return {}, problems  # that its files cannot be read has been told
    found: dict[str, Source] = {}
    lacking: list[str] = []
    apart: dict[str, str] = {}
    for slot in wanted:
        sources = [slot.sources[i] for i in resolved[slot.name].counting]
        first = sources[0].weight
        others = {source.weight.name for source in sources}
        if len(others) > 1:
            apart[slot.name] = " and ".join(sorted(others))
            continue
        source = Source(base, first, files[base].find(first))
        if source.stored is None:
            lacking.append(slot.name)
        elif (
            slot.sizes(source.tensor.shape) != slot.sizes(sources[0].tensor.shape)
            or not source.tensor.is_floating
        ):
            problems.append(
                f"{slot.name} is {list(sources[0].tensor.shape)}, but {list(source.tensor.shape)} "
                f"({source.tensor.dtype}) in base_model {base}, so there is no prior for it. "
                f"Switch it off there: {_without(slot.name)}"
            )
        else:
            found[slot.name] = source
    for name, of in [*apart.items()][:1]:
        more = f", nor for {len(apart) - 1:,} more" if len(apart) > 1 else ""
        problems.append(
            f"{name} is merged of {of}, which did not begin as one tensor of base_model, so there "
            f"is no prior for it{more}. Switch it off where different layers go together: "
            "`prior: false` under the `parameters:` of each such slice."
        )
    if lacking:
        problems.append(
            f"base_model {base} lacks {some(lacking, 1)}, so there is no prior for it. Switch it "
            f"off there: {_without(*lacking)}"
        )
    return found, problems


def _warn_of_shares(wanted: Sequence[Slot], resolved: Mapping[str, TensorSettings]) -> None:
    """Tell of lambdas that were hardly meant to be absolute, such as 70 and 30."""
    lambdas = max((resolved[slot.name].lambdas for slot in wanted), key=math.fsum)
    if math.fsum(lambdas) > 2 * len(lambdas):
        LOG.warning(
            "With `prior: true` lambdas are absolute: each says how much of its model is added to "
            "base_model. They sum to %g here, which goes far beyond the models; for shares of one "
            "whole, divide them by that.",
            math.fsum(lambdas),
        )


def open_prior(
    bases: Mapping[str, Source],
    config: MergeConfiguration,
    files: Files,
    remedies: Remedies,
    *,
    is_listed: bool,
) -> tuple[Sidecar | None, list[str]]:
    """Open the base's sidecar, and check it against the base.

    Args:
        bases: the base's tensors, some.
        config: the recipe.
        files: every model's tensors.
        remedies: for messages; knows the sidecars that the recipe names for its models, perhaps
            the base's too.
        is_listed: whether the base is one of the models, too.
    """
    base = config.base_model
    assert base is not None
    named = (config.parameters or {}).get(PRIOR_SIDECAR.name)
    if named is not None and not (isinstance(named, str) and named):
        return None, [
            f"parameters: {PRIOR_SIDECAR.name}: expected a folder or a .safetensors file, got "
            f"{named!r}."
        ]
    own = remedies.given.get(base)
    place = Path(named) if named else own
    path = place or sidecars.place_of(base, files[base].checkpoint.folder, KIND)
    names = part_names(bases.values())
    # With its recipe a model is measured once, and into its own place.
    apart = is_listed and place != own
    remedy = by_itself(base, KIND, place) if apart else remedies.of(base, KIND, place)
    return sidecars.open_checked(base, path, KIND, files[base], names, remedy)


def _without(*names: str) -> str:
    """Return the line that switches the prior off for some tensors."""
    filters = [f"{{filter: {name}, value: false}}" for name in names]
    return f"`prior: [{', '.join([*filters, '{value: true}'])}]`"
