"""The commands that measure what a merge lacks, for messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache

from fisher_mergekit.merging import command

MEASURE = "Run: mergekit-fisher precompute"
DEFAULT_KIND = "fisher"
"""What `precompute --model` measures when nothing else is asked for."""


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
        return command.is_one_of_several()

    def of(self, model: ModelReference, kind: str, place: Path | None = None) -> str:
        """Return the sentence with the command that measures a kind of a model, for a place."""
        place = place or self.given.get(model)
        return command_for(model, kind, place, one_by_one=self.one_by_one)

    @property
    def of_all(self) -> str:
        """The command that measures the recipe's models."""
        one = f"{MEASURE} --model MODEL --path DATA --text COLUMN"
        return one if self.one_by_one else f"{MEASURE} RECIPE"


def command_for(
    model: ModelReference,
    kind: str = DEFAULT_KIND,
    out: Path | None = None,
    *,
    one_by_one: bool = True,
) -> str:
    """Return the sentence with the command that measures a model, by itself or with its recipe."""
    flags = _flags(model)
    if not one_by_one:
        return f"{MEASURE} RECIPE{flags}"
    which = "" if kind == DEFAULT_KIND else f" --kind {kind}"
    place = f" --out {out}" if out is not None else ""
    return f"{MEASURE} --model {model}{which}{place}{flags} --path DATA --text COLUMN"


def _flags(model: ModelReference) -> str:
    """Return the flags of this merge that the measuring of a model needs too."""
    loaders = LoaderCache()
    given: dict[str, str | None] = {}
    if model.lora is not None:
        given["--lora-merge-cache"] = loaders.lora_cache_dir
        given["--lora-merge-dtype"] = loaders.lora_merge_dtype
    if not all(Path(part.path).exists() for part in (model.model, model.lora) if part is not None):
        given["--transformers-cache"] = loaders.hf_cache_dir
    words = [f" {flag} {value}" for flag, value in given.items() if value]
    return "".join([*words, " --trust-remote-code" if loaders.trust_remote_code else ""])
