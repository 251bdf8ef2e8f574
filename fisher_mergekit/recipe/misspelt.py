"""Keys of a recipe that are nearly mergekit's own or ours, which mergekit would drop in silence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mergekit.config import InputModelDefinition, InputSliceDefinition, MergeConfiguration
from mergekit.tokenizer.config import TokenizerConfig

from fisher_mergekit.errors import nearest

NEAR = 0.8
"""How alike two words are that are one misspelt; `notes` and `models` are 0.55 alike."""

_OURS = "calibration"


def misspelt(
    content: Mapping[str, Any], entries: Iterable[tuple[str, Mapping[str, Any]]]
) -> list[str]:
    """Say which keys are nearly one that is known, and not it.

    Keys that are like none stay: people keep notes and YAML anchors there.

    Args:
        content: the recipe.
        entries: the models' own blocks, each with the model's name for the message.
    """
    inputs = (*InputModelDefinition.model_fields, *InputSliceDefinition.model_fields, _OURS)
    blocks = [("the recipe", content, (*MergeConfiguration.model_fields, _OURS))]
    blocks += [(model, entry, inputs) for model, entry in entries]
    if isinstance(tokenizer := content.get("tokenizer"), Mapping):
        blocks.append(("tokenizer", tokenizer, tuple(TokenizerConfig.model_fields)))
    return [
        f"{where}: unknown key {key!r}.{near}"
        for where, block, known in blocks
        for key in map(str, block)
        if key not in known and (near := nearest(key, known, cutoff=NEAR))
    ]
