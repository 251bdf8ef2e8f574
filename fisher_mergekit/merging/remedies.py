"""The commands that measure what a merge lacks, for messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache

from fisher_mergekit.merging.command import is_one_of_several, recipe
from fisher_mergekit.shell import flags, word

MEASURE = "Run: mergekit-fisher precompute"
DEFAULT_KIND = "fisher"
"""What `precompute --model` measures when nothing else is asked for."""


@dataclass(frozen=True)
class Remedy:
    """Sentences with the command that measures one model.

    Attributes:
        measure: it has no sidecar, or one that `precompute` sees is of no use.
        again: it has one that `precompute` would take for valid.
    """

    measure: str
    again: str


@dataclass(frozen=True)
class Remedies:
    """The commands that measure what a recipe's models lack.

    Attributes:
        given: the sidecars that the recipe names.
    """

    given: Mapping[ModelReference, Path]

    @property
    def one_by_one(self) -> bool:
        """Whether it is one of several in a file for mergekit-multi, which `precompute` refuses."""
        return is_one_of_several()

    def of(self, model: ModelReference, kind: str, place: Path | None = None) -> Remedy:
        """Return the sentences with the command that measures a kind of a model.

        Args:
            place: of its sidecar, if that is not the one that the recipe names for the model.
        """
        if self.one_by_one:
            return by_itself(model, kind, place or self.given.get(model))
        command, more = f"{MEASURE} {recipe()}", _flags(model)
        return Remedy(f"{command}{more}", f"{command} --model {word(model)} --force{more}")

    @property
    def of_all(self) -> str:
        """The command that measures the recipe's models."""
        one = f"{MEASURE} --model MODEL --path DATA --text COLUMN"
        return one if self.one_by_one else f"{MEASURE} {recipe()}"


def by_itself(model: ModelReference, kind: str = DEFAULT_KIND, place: Path | None = None) -> Remedy:
    """Return the sentences with the command that measures a model without its recipe."""
    which = "" if kind == DEFAULT_KIND else f" --kind {kind}"
    out = f" --out {word(place)}" if place is not None else ""
    command = (
        f"{MEASURE} --model {word(model)}{which}{out}{_flags(model)} --path DATA --text COLUMN"
    )
    return Remedy(command, f"{command} --force")


def _flags(model: ModelReference) -> str:
    """Return the flags of this merge that the measuring of a model needs too."""
    loaders = LoaderCache()
    given: dict[str, str | bool | None] = {}
    if model.lora is not None:
        given["--lora-merge-cache"] = loaders.lora_cache_dir
        given["--lora-merge-dtype"] = loaders.lora_merge_dtype
    if not all(Path(part.path).exists() for part in (model.model, model.lora) if part is not None):
        given["--transformers-cache"] = loaders.hf_cache_dir
    given["--trust-remote-code"] = loaders.trust_remote_code
    return flags(given)
