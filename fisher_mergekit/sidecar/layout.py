"""What transformers makes of a checkpoint's tensors while loading: which parameter is made of what.

Most tensors in the files are parameters as they are, some under another name (`LayerNorm.gamma`, a
checkpoint without the head's prefix, a vision-language model saved by an older version). Others
are *converted*: the experts of one layer, a file tensor each, are packed into one parameter, or
the rows of a fused projection are dealt out to three. Conversions move elements; so a statistic of
each element goes the same way, here in both directions: a merge asks for the parameter that the
files make, and a measurement for the tensors in the files that a parameter was made of.

That a conversion only moves elements is not believed. It is run on tensors of element numbers, and
every number has to arrive once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.initialization import no_init_weights

from fisher_mergekit.errors import CheckpointError, some
from fisher_mergekit.sidecar.checkpoint import TensorInfo

BLOCK = 1 << 24
"""Elements that are looked up at once: an index is 8 bytes an element, and experts are large."""


def skeleton(config: Any, architecture: str) -> nn.Module | None:
    """Return the model that a configuration describes, without memory for its parameters.

    Returns:
        The model on the meta device, to look at only: it is the same for equal configurations, as
        those of most models that are merged are. None if transformers has no such class: remote
        code is not run before it has to be.

    Raises:
        CheckpointError: a configuration that describes no model.
    """
    if not hasattr(transformers, architecture):
        return None
    key = architecture, text_of(config)
    if key not in _skeletons:
        _skeletons[key] = _build(deepcopy(config), architecture)
    return _skeletons[key]


def text_of(config: Any) -> str:
    """Return all that a configuration says, without whose it is: equal for models built alike."""
    said = {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}
    return json.dumps(said, sort_keys=True, default=str)


_skeletons: dict[tuple[str, str], nn.Module] = {}


def _build(config: Any, architecture: str) -> nn.Module:
    if isinstance(getattr(config, "dtype", None), str):
        # mergekit writes its name into a configuration that it has loaded; some models use it.
        config.dtype = getattr(torch, config.dtype)
    try:
        with torch.device("meta"), no_init_weights():  # initial values would take half the time
            built: Any = getattr(transformers, architecture)(config)
        built.tie_weights()  # which is a part of what was left out
    except Exception as error:  # whatever its code stumbles over
        raise CheckpointError(
            f"config.json describes no {architecture} that transformers can build: {error}"
        ) from None
    model: nn.Module = built
    return model


@dataclass(frozen=True, eq=False)
class Group:
    """Tensors in the files that become parameters (or buffers) together; most often one and one.

    Attributes:
        sources: the tensors in the files, in the order in which they are converted.
        targets: name in memory and shape of everything that is made of them.
    """

    sources: tuple[TensorInfo, ...]
    targets: Mapping[str, tuple[int, ...]]
    _patterns: tuple[str, ...] = ()
    _converter: Any = None
    _model: Any = None

    @property
    def is_plain(self) -> bool:
        """Whether it is one tensor that is a parameter as it is."""
        return self._converter is None

    def convert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what transformers makes of the sources, by name in memory.

        Args:
            tensors: by name in the files, in the sources' shapes; of any dtype and device.

        Raises:
            CheckpointError: they do not fit together.
        """
        first = next(iter(self.targets))
        if self.is_plain:
            return {first: tensors[self.sources[0].name]}
        return _convert(self._converter, self._model, first, self._patterns, self.sources, tensors)

    def places(self) -> dict[str, Tensor]:
        """Return, for every element in memory, its place in the sources laid end to end.

        Returns:
            By name in memory, in the shapes of memory; int32 where that is enough.

        Raises:
            CheckpointError: the conversion does not move every element to one place.
        """
        total = sum(source.count for source in self.sources)
        dtype = torch.int32 if total < 2**31 else torch.int64
        numbers: dict[str, Tensor] = {}
        start = 0
        for source in self.sources:
            stop = start + source.count
            numbers[source.name] = torch.arange(start, stop, dtype=dtype).view(source.shape)
            start = stop
        made = self.convert(numbers)
        del numbers
        arrived = torch.zeros(total, dtype=torch.bool)
        whole = sum(tensor.numel() for tensor in made.values()) == total
        for tensor in made.values():
            if not whole or tensor.dtype != dtype or (total and not _within(tensor, total)):
                whole = False
                break
            for block in tensor.reshape(-1).split(BLOCK):
                arrived[block.long()] = True
        if not (whole and arrived.all()):
            raise CheckpointError(
                f"transformers computes {' and '.join(made)} from {self.described()} while "
                "loading, rather than only moving numbers; what is known of each number cannot "
                "follow."
            )
        return made

    def restore(self, values: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the sources' names and, in their shapes, what stands in memory at their elements.

        Args:
            values: one tensor for each target, by name in memory, in its shape.
        """
        if self.is_plain:
            yield self.sources[0].name, next(iter(values.values()))
            return
        places = self.places()
        example = next(iter(values.values()))
        flat = example.new_empty(sum(source.count for source in self.sources), device="cpu")
        for name, place in places.items():
            value = values[name].reshape(-1)
            for index, block in zip(
                place.reshape(-1).split(BLOCK), value.split(BLOCK), strict=True
            ):
                flat[index.long()] = block.to("cpu")
        start = 0
        for source in self.sources:
            yield source.name, flat[start : start + source.count].view(source.shape).clone()
            start += source.count

    def described(self) -> str:
        """Return the sources' names, of many the first ones."""
        return some([source.name for source in self.sources], 2)


class Layout:
    """How the tensors of a checkpoint become a model's parameters and buffers.

    Args:
        model: of the class that loads them; may be on the meta device.
        files: the tensors in the files.

    Attributes:
        groups: what becomes what.
        parameters: names of the tensors in the files that become parameters.
        unused: those that the model has no place for.

    Raises:
        CheckpointError: tensors that are converted together do not fit together.
    """

    def __init__(self, model: nn.Module, files: Mapping[str, TensorInfo]):
        transforms = get_model_conversion_mapping(model)  # anew: they remember what they changed
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._prefix = getattr(model, "base_model_prefix", "")
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._known = parameters | {name for name, _ in model.named_buffers(remove_duplicate=False)}
        groups: list[Group] = []
        unused: list[str] = []
        together: dict[str, tuple[WeightConverter, list[str], list[TensorInfo]]] = {}
        for name in sorted(files, key=_natural):
            target, converter, pattern = self._rename(name)
            if target is None:
                unused.append(name)
            elif converter is None:
                groups.append(Group((files[name],), {target: files[name].shape}))
            else:
                _, patterns, sources = together.setdefault(target, (converter, [], []))
                patterns.append(pattern)
                sources.append(files[name])
        for target, (converter, patterns, sources) in together.items():
            shapes = {s.name: torch.empty(s.shape, device="meta") for s in sources}
            made = _convert(converter, model, target, patterns, sources, shapes)
            targets = {name: tuple(tensor.shape) for name, tensor in made.items()}
            groups.append(Group(tuple(sources), targets, tuple(patterns), converter, model))
        self.groups = tuple(groups)
        self.parameters = tuple(
            s.name for g in groups if g.targets.keys() & parameters for s in g.sources
        )
        self.unused = tuple(unused)
        self._made = {target: group for group in reversed(groups) for target in group.targets}

    def maker(self, name: str) -> tuple[str, Group] | None:
        """Return a parameter's name in memory, and what it is made of; None if it is not.

        Args:
            name: the parameter's name in memory, or one that transformers changes into it.
        """
        if name in self._made:
            return name, self._made[name]
        target, converter, _ = self._rename(name)
        if converter is None and target in self._made:
            return target, self._made[target]
        return None

    def _rename(self, name: str) -> tuple[str | None, WeightConverter | None, str]:
        """Return what a tensor of the files becomes (part of), through which converter, if any."""
        renamed, pattern = name, None
        for renaming in self._renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        for converter in self._converters:
            renamed, pattern = converter.rename_source_key(renamed)
            if pattern is not None:
                # As transformers: the last converter of a pattern is the one that is used.
                owner = [c for c in self._converters if pattern in c.source_patterns][-1]
                for spelling in self._spellings(renamed):
                    if spelling in self._known:
                        return spelling, owner, pattern
                break
        for spelling in (*self._spellings(renamed), *self._spellings(name)):
            if spelling in self._known:
                return spelling, None, ""
        return None, None, ""

    def _spellings(self, name: str) -> Iterable[str]:
        """Return a name, and what it is with and without the prefix of the model's body."""
        return name, f"{self._prefix}.{name}", name.removeprefix(f"{self._prefix}.")


def _convert(
    converter: Any,
    model: Any,
    first: str,
    patterns: Iterable[str],
    sources: Iterable[TensorInfo],
    tensors: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    own = deepcopy(converter)  # it collects what it is given
    for source, pattern in zip(sources, patterns, strict=True):
        own.add_tensor(first, source.name, pattern, tensors[source.name])
    try:
        made = own.convert(first, model=model, config=getattr(model, "config", None))
    except (RuntimeError, ValueError, IndexError, KeyError, AttributeError, TypeError) as error:
        names = some([source.name for source in sources])
        raise CheckpointError(f"transformers cannot make {first} of {names}: {error}") from None
    return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}


def _natural(name: str) -> list[str | int]:
    """Return a sort key by which expert 10 comes after expert 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _within(places: Tensor, total: int) -> bool:
    if not places.numel():
        return True
    lowest, highest = places.aminmax()
    return bool(lowest >= 0 and highest < total)
