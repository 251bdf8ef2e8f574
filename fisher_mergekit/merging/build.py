"""From ways to tasks: what is loaded for an output tensor, shared, and solved."""

from __future__ import annotations

import inspect
from typing import Any

from mergekit.config import MergeConfiguration
from mergekit.graph import Task
from mergekit.options import MergeOptions

from fisher_mergekit.merging.settings import TensorSettings
from fisher_mergekit.merging.slots import Slot, Source
from fisher_mergekit.merging.tasks import (
    ConvertTask,
    CopyTask,
    LoadPrecision,
    LoadTheta,
    MergeTask,
    Options,
    SharedTask,
)
from fisher_mergekit.merging.ways import Decision, Way, factors_of
from fisher_mergekit.precision import kind_for
from fisher_mergekit.precision.prior import with_base
from fisher_mergekit.sidecar.reader import Sidecar


class Builder:
    """Builds the tasks of one merge.

    Args:
        decision: how everything is merged.
        config: the recipe.
        options: mergekit's.
    """

    def __init__(self, decision: Decision, config: MergeConfiguration, options: MergeOptions):
        self._decision = decision
        self._config = config
        self._device = options.device if options.read_to_gpu else None
        # Layers that share their inputs are merged together, under the first one's name.
        self._first: dict[object, str] = {}
        for name, way in decision.ways.items():
            key = _inputs_of(way)
            if key is not None:
                self._first[key] = min(name, self._first.get(key, name))

    def task(self, slot: Slot) -> Task[Any]:
        """Return the task that makes one output tensor."""
        if slot.name in self._decision.pieces:
            first, pieces = slot.sources[0], self._decision.pieces[slot.name]
            return ConvertTask(
                name=slot.name,
                model=first.model,
                target=first.tensor.name,
                pieces=tuple((s.sources[0].tensor.name, self._merge(s)) for s in pieces),
            )
        if slot.name in self._decision.ways:
            return self._merge(slot)
        dtype = self._dtype(slot) if slot.is_floating else slot.weight.force_dtype
        return CopyTask(name=slot.name, theta=self._theta(slot.sources[0], slot.name), dtype=dtype)

    def _dtype(self, slot: Slot) -> str | None:
        """Return what to cast to, once: what is written, not what mergekit would compute in."""
        dtype: str | None = slot.weight.force_dtype or self._config.out_dtype or self._config.dtype
        return dtype

    def _merge(self, slot: Slot) -> MergeTask:
        way = self._decision.ways[slot.name]
        values = self._decision.settings[slot.name]
        lambdas = tuple(values.lambdas[i] for i in values.counting)
        if way.has_base:
            lambdas = with_base(lambdas)
        group, label = self._labels(slot.name, way)
        precisions: tuple[tuple[LoadPrecision, ...], ...] = ((),) * len(way.sources)
        if way.sidecars:
            precisions = tuple(
                _precisions(source, sidecar, group, label)
                for source, sidecar in zip(way.sources, way.sidecars, strict=True)
            )
        kind = kind_for(way.kind)
        shared = None
        if hasattr(kind, "common"):
            shared = SharedTask(
                kind=way.kind,
                inputs=tuple(parts[0] for parts in precisions),
                lambdas=lambdas,
                options=self._options(kind.common, way, values),
                label=group,
            )
        return MergeTask(
            name=slot.name,
            kind=way.kind,
            thetas=tuple(self._theta(source, label) for source in way.sources),
            lambdas=lambdas,
            precisions=precisions,
            options=self._options(kind.system, way, values),
            shared=shared,
            input_axis=way.input_axis,
            dtype=self._dtype(slot),
            label=label,
        )

    def _theta(self, source: Source, label: str) -> LoadTheta:
        return LoadTheta(
            model=source.model,
            name=source.tensor.name,
            parts=_parts(source),
            label=label,
            device=self._device,
        )

    def _labels(self, name: str, way: Way) -> tuple[str, str]:
        """Return the labels of what is shared, and of what is the tensor's own.

        The executor goes by the labels' order, so the own label begins with the shared one.
        """
        group = self._first.get(_inputs_of(way), name)
        return group, name if name == group else f"{group} {name}"

    def _options(self, function: Any, way: Way, values: TensorSettings) -> Options:
        """Return what a function of the kind takes, of all that the recipe and sidecars say."""
        known = {
            **values.options,
            "scales": tuple(self._decision.scales[key] for key in way.keys),
            "normalize": values.options.get("normalize_fishers", True),
            "favor": values.counting.index(values.favored)
            if values.favored in values.counting
            else None,
        }
        accepted = inspect.signature(function).parameters
        return tuple((name, value) for name, value in known.items() if name in accepted)


def _inputs_of(way: Way) -> object:
    """Return which stored inputs a matrix's precisions have, or None for no matrix."""
    if not way.sidecars or factors_of(way.sidecars[0], way.sources[0]) is None:
        return None
    return tuple(
        (sidecar.path, sidecar.stored(source.tensor.parts[0].name)[0])
        for source, sidecar in zip(way.sources, way.sidecars, strict=True)
    )


def _precisions(
    source: Source, sidecar: Sidecar, group: str, label: str
) -> tuple[LoadPrecision, ...]:
    """Return the tasks that load what was measured of one model's tensor.

    Args:
        group: label of the inputs' factor, which other layers may share.
        label: of all others.
    """

    def load(name: str, **more: Any) -> LoadPrecision:
        return LoadPrecision(
            model=source.model, path=sidecar.path, kind=sidecar.kind, name=name, **more
        )

    factors = factors_of(sidecar, source)
    if factors is None:
        return (load(source.tensor.name, parts=_parts(source), label=label),)
    width = len(source.tensor.shape)
    return tuple(
        load(
            name,
            form="matrix" if len(sidecar[name].shape) == width else "diagonal",
            label=group if name == factors.inputs else label,
        )
        for name in factors.names
    )


def _parts(source: Source) -> tuple[str, ...]:
    """Return the names in the files of what is converted, or nothing for a tensor as it is."""
    return tuple(part.name for part in source.tensor.parts) if source.tensor.group else ()
