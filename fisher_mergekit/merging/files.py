"""What a model's files hold, or give through transformers' conversion, for one of mergekit's names.

mergekit's names are partly those in the files, partly those in memory, of this version of
transformers or of an older one. A tensor that the files hold under that very name is taken as it
is, as mergekit does. Any other is what transformers would make of the files while loading; and
what was measured of those tensors is converted alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import xxhash
from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from torch import Tensor

from fisher_mergekit.errors import CheckpointError
from fisher_mergekit.merging.planned import Planned
from fisher_mergekit.sidecar.checkpoint import Checkpoint, TensorInfo
from fisher_mergekit.sidecar.layout import Group, Layout, skeleton


@dataclass(frozen=True)
class Stored:
    """A tensor that a model's files give.

    Attributes:
        name: in the files; of one that is made by conversion, in memory.
        shape: as it is merged.
        parts: the tensors in the files that it is, or is made of.
        group: the conversion, or None for a tensor that is in the files as it is.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[TensorInfo, ...]
    group: Group | None = None

    @property
    def dtype(self) -> str:
        """The dtype it is stored in (safetensors spelling); of several, one that cannot be merged.

        Parts of one tensor may differ in dtype; then they are promoted.
        """
        return next((p.dtype for p in self.parts if not p.is_floating), self.parts[0].dtype)

    @property
    def is_floating(self) -> bool:
        """Whether it holds ordinary floating-point numbers."""
        return all(part.is_floating for part in self.parts)

    def digest(self) -> str:
        """Return a digest of what it is, or is made of."""
        if len(self.parts) == 1:
            return self.parts[0].digest()
        return xxhash.xxh3_128_hexdigest("".join(p.digest() for p in self.parts).encode())


class ModelFiles(Mapping[str, TensorInfo]):
    """One model's tensors by the names in its files, and what transformers makes of them.

    Args:
        model: as the recipe names it.

    Attributes:
        trouble: why transformers would make nothing of them, if that has been asked.

    Raises:
        CheckpointError: no files, or damaged ones.
    """

    def __init__(self, model: ModelReference):
        self.model = model
        self.trouble: str | None = None
        # Where it is, mergekit knows; but it keeps what it has opened for all merges of a process,
        # and would read a model that was saved anew in between from its old files.
        self.checkpoint = Checkpoint(LoaderCache().get(model).index.base_path)

    def __getitem__(self, name: str) -> TensorInfo:
        return self.checkpoint[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint)

    def __len__(self) -> int:
        return len(self.checkpoint)

    @cached_property
    def config(self) -> Any:
        """The model's `transformers` configuration."""
        return self.model.config(trust_remote_code=LoaderCache().trust_remote_code)

    @cached_property
    def layout(self) -> Layout | None:
        """What transformers makes of the files; None for a class that it does not have."""
        try:
            model = skeleton(self.config, (self.config.architectures or [""])[0])
            return None if model is None else Layout(model, self.checkpoint)
        except CheckpointError as error:
            self.trouble = error.message
            return None

    @property
    def parameters(self) -> Sequence[str]:
        """The parameters' names in the files; none of a class that is not in transformers."""
        return () if self.layout is None else self.layout.parameters

    def find(self, weight: WeightInfo) -> Stored | None:
        """Return the tensor that is merged for a weight, without reading it.

        A weight that the files do not hold itself may be tied to one that they do.
        """
        names = (*_own_names(weight), *(weight.tied_names or ()))
        return self._as_it_is(names) or self._made(names)

    def holds(self, weight: WeightInfo) -> bool:
        """Whether the files give the weight itself, not only one that it is tied to."""
        names = _own_names(weight)
        return any(name in self for name in names) or self._made(names) is not None

    def convert(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return one parameter, made of the tensors in the files.

        Args:
            name: in memory.
            tensors: by name in the files: weights, or what was measured of them.
        """
        assert self.layout is not None
        maker = self.layout.maker(name)
        assert maker is not None
        return maker[1].convert(tensors)[maker[0]]

    def _as_it_is(self, names: tuple[str, ...]) -> Stored | None:
        found = next((self[name] for name in names if name in self), None)
        return None if found is None else Stored(found.name, found.shape, (found,))

    def _made(self, names: tuple[str, ...]) -> Stored | None:
        if self.layout is None:
            return None
        for name in names:
            maker = self.layout.maker(name)
            if maker is not None:
                target, group = maker
                return Stored(target, group.targets[target], group.sources, group)
        return None


Files: TypeAlias = Mapping[ModelReference, ModelFiles]
"""Each model's files."""

OPENED = Planned(ModelFiles)
"""The files of this merge's models, by model."""


def _own_names(weight: WeightInfo) -> tuple[str, ...]:
    return (weight.name, *(weight.aliases or ()))
