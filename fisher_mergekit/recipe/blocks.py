"""The blocks of a recipe: each mapping in it that mergekit knows, as written and as understood."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mergekit.config import (
    ConditionalParameter,
    InputModelDefinition,
    InputSliceDefinition,
    MergeConfiguration,
)
from mergekit.tokenizer.config import TokenizerConfig
from pydantic import BaseModel


@dataclass(frozen=True)
class Block:
    """One mapping of a recipe.

    Attributes:
        where: how messages call it.
        understood: what mergekit has made of it, an object of its class for such a block.
        written: what the file says, or nothing where nobody has the file.
        within: the blocks around it that may have `parameters`, from the innermost on.
    """

    where: str
    understood: Any
    written: Mapping[str, Any] = field(default_factory=dict)
    within: tuple[Block, ...] = ()

    @property
    def fields(self) -> tuple[str, ...]:
        """The keys that mergekit knows in such a block."""
        return tuple(type(self.understood).model_fields)

    @property
    def is_whole(self) -> bool:
        """Whether it is the recipe itself."""
        return isinstance(self.understood, MergeConfiguration)

    @property
    def is_model(self) -> bool:
        """Whether it is a model's own, under `models:` or among the sources of a slice."""
        return isinstance(self.understood, (InputModelDefinition, InputSliceDefinition))

    @property
    def parameters(self) -> Mapping[str, Any]:
        """What stands under its `parameters`, as understood."""
        return getattr(self.understood, "parameters", None) or {}

    @property
    def has_parameters(self) -> bool:
        """Whether `parameters` can stand there."""
        return "parameters" in self.fields


def blocks(config: MergeConfiguration, content: Mapping[str, Any] | None = None) -> Iterator[Block]:
    """Yield the recipe, its modules, slices, models, references to models, filters and tokens.

    Args:
        config: the recipe as mergekit understands it.
        content: as it is written.
    """
    for block in (*_merged(config, content or {}), *_tokenizer(config, content)):
        yield block
        yield from _filters(block)
        yield from _nested(block)


def _merged(config: MergeConfiguration, content: Mapping[str, Any]) -> Iterator[Block]:
    """Yield the blocks that may have `parameters`; slices are counted through all modules."""
    whole = Block("the recipe", config, content)
    parts = [(whole, "")] + [
        (Block(f"module {name}", module, _at(content, "modules", name), (whole,)), f" in {name}")
        for name, module in (config.modules or {}).items()
    ]
    count = itertools.count()
    for part, within in parts:
        yield part
        around = (part, *part.within)
        for i, entry in enumerate(part.understood.models or ()):
            yield Block(f"{entry.model}{within}", entry, _at(part.written, "models", i), around)
        for i, piece in enumerate(part.understood.slices or ()):
            own = Block(f"slice {next(count)}", piece, _at(part.written, "slices", i), around)
            yield own
            for j, source in enumerate(piece.sources):
                where = f"{source.model} in {own.where}"
                yield Block(where, source, _at(own.written, "sources", j), (own, *around))


def _tokenizer(config: MergeConfiguration, content: Any) -> Iterator[Block]:
    """Yield what is said of the tokenizer, and of single tokens."""
    if config.tokenizer is not None:
        written = _at(content, "tokenizer")
        yield Block("tokenizer", config.tokenizer, written)
        for token, entry in (config.tokenizer.tokens or {}).items():
            yield Block(f"token {token!r}", entry, _at(written, "tokens", token))


def _nested(block: Block) -> Iterator[Block]:
    """Yield what is written as a mapping where most write a word: models, sources of tokens."""
    for key in block.fields:
        inner, written = getattr(block.understood, key), block.written.get(key)
        is_block = isinstance(inner, BaseModel) and not isinstance(inner, TokenizerConfig)
        if is_block and isinstance(written, Mapping):
            nested = Block(f"{key} of {block.where}", inner, written)
            yield nested
            yield from _nested(nested)


def _filters(block: Block) -> Iterator[Block]:
    """Yield the values of parameters that hold for some tensors only."""
    for key, setting in block.parameters.items():
        written = _at(block.written, "parameters", key)
        several = isinstance(setting, list)
        for i, part in enumerate(setting if several else [setting]):
            if isinstance(part, ConditionalParameter):
                where = f"{key} of {block.where}"
                yield Block(where, part, _at(written, i) if several else written)


def _at(written: Any, *path: Any) -> Any:
    """Return what is written at some place, or nothing."""
    for step in path:
        try:
            written = written[step]
        except (LookupError, TypeError):
            return {}
    return written if isinstance(written, (Mapping, list)) else {}
