"""How many layers a sliced recipe makes, and what the output's configuration says of each.

mergekit writes the number of layers into the output's configuration and leaves alone what it says
of single layers (which of them attend to a window only, which are mixtures of experts). Newer
versions of transformers do not load a list of another length, and a list of the right length may
tell of the wrong layers; so those lists follow the source layers, as the statistics do.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit.architecture import ModelArchitecture
from mergekit.common import get_config_value
from mergekit.config import OutputModuleDefinition, OutputSliceDefinition

from fisher_mergekit.merging.files import Files

LOG = logging.getLogger(__name__)

PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Keys of a configuration that have one entry a layer."""


def settle(
    modules: Mapping[str, OutputModuleDefinition],
    architecture: ModelArchitecture,
    config: Any,
    files: Files,
) -> list[str]:
    """Let the output's configuration describe the layers that the slices take; say what cannot be.

    Args:
        modules: of a recipe in mergekit's normal form.
        architecture: mergekit's description of the models.
        config: the output's `transformers` configuration; what it says of single layers is changed.
        files: the models', with their own configurations.
    """
    problems = []
    for name, module in modules.items():
        slices = module.slices or []
        made = sum(_length(piece) for piece in slices)
        described = architecture.modules[name].architecture
        asked = described.num_layers(config)
        if made != asked:
            problems.append(
                f"the slices of module {name} make {made} layers, but the output's configuration "
                f"says {asked}, and mergekit does not know where to change it for this kind of "
                f"model. Make {asked} layers, or name a `base_model:` that has {made}."
            )
            continue
        section, _, _ = (described.num_layers_config_key() or "").rpartition(".")
        for key in PER_LAYER:
            _follow(key, section, slices, config, files)
    return problems


def _follow(
    key: str,
    section: str,
    slices: Sequence[OutputSliceDefinition],
    config: Any,
    files: Files,
) -> None:
    """Make a list of one entry a layer anew, of the source layers' entries in their own models."""
    output = get_config_value(config, section) if section else config
    if not isinstance(getattr(output, key, None), (list, tuple)):
        return
    entries: list[Any] = []
    for piece in slices:
        for offset in range(_length(piece)):
            found = {}
            for source in (s for s in piece.sources if s.model in files):
                whole = files[source.model].config
                own = getattr(get_config_value(whole, section) if section else whole, key, None)
                layer = source.layer_range[0] + offset
                if own is not None and layer < len(own):
                    found[f"layer {layer} of {source.model}"] = own[layer]
            if not found:
                return  # nobody says; and what goes beyond the last layer is told elsewhere
            if len(set(found.values())) > 1:
                LOG.warning(
                    "Layer %d of the output is made of layers that differ in `%s`: %s. It gets the "
                    "first one's.",
                    len(entries),
                    key,
                    ", ".join(f"{value} is {name}" for name, value in found.items()),
                )
            entries.append(next(iter(found.values())))
    setattr(output, key, entries)


def _length(piece: OutputSliceDefinition) -> int:
    start, stop = piece.sources[0].layer_range
    return int(stop - start)
