"""From ways to tasks: what is loaded for an output tensor, shared, and solved."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

from mergekit.config import MergeConfiguration
from mergekit.graph import Task
from mergekit.options import MergeOptions

from fisher_mergekit.merging.aligning import (
    AlignPrecision,
    AlignThetas,
    FirstRows,
    Gather,
    PickTheta,
    TokenRows,
    TruncateThetas,
)
from fisher_mergekit.merging.loading import LoadPrecision, LoadTheta, OwnRows, Precision, Theta
from fisher_mergekit.merging.settings import TensorSettings
from fisher_mergekit.merging.slots import Slot, Source
from fisher_mergekit.merging.tasks import ConvertTask, CopyTask, MergeTask, Options, SharedTask
from fisher_mergekit.merging.vocabulary import Vocabulary
from fisher_mergekit.merging.ways import Decision, Way, factors_of, runs_along_tokens
from fisher_mergekit.precision import kind_for
from fisher_mergekit.precision.prior import with_base
from fisher_mergekit.sidecar.reader import Sidecar


class Builder:
    """Builds the tasks of one merge.

    Args:
        decision: how everything is merged.
        config: the recipe.
        options: mergekit's.
        tokens: what becomes of the tables of tokens.
    """

    def __init__(
        self,
        decision: Decision,
        config: MergeConfiguration,
        options: MergeOptions,
        tokens: Vocabulary,
    ):
        self._decision = decision
        self._tokens = tokens
        self._config = config
        self._device = options.device if options.read_to_gpu else None
        # Layers that share their inputs are merged together, under the first one's name.
        self._first: dict[object, str] = {}
        for name, way in decision.ways.items():
            key = None if way.is_copy else _inputs_of(way)
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
        way = self._decision.ways.get(slot.name)
        if way is not None and not way.is_copy:
            return self._merge(slot)
        dtype = self._dtype(slot) if slot.is_floating else slot.weight.force_dtype
        (theta,) = self._thetas(slot, [self._decision.source_of(slot)], slot.name)
        return CopyTask(name=slot.name, theta=theta, dtype=dtype)

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
        precisions: tuple[tuple[Precision, ...], ...] = ((),) * len(way.sources)
        if way.sidecars:
            precisions = tuple(
                self._aligned(slot, way, index, _precisions(source, sidecar, group, label))
                for index, (source, sidecar) in enumerate(
                    zip(way.sources, way.sidecars, strict=True)
                )
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
            thetas=self._thetas(slot, way.sources, label),
            lambdas=lambdas,
            precisions=precisions,
            options=self._options(kind.system, way, values),
            shared=shared,
            present=self._present(slot, way),
            input_axis=way.input_axis,
            dtype=self._dtype(slot),
            label=label,
        )

    def _thetas(self, slot: Slot, sources: Sequence[Source], label: str) -> tuple[Theta, ...]:
        """Return the tasks that give the models' tensors, with the output's tokens."""

        def load(source: Source) -> LoadTheta:
            return LoadTheta(
                model=source.model,
                name=source.tensor.name,
                parts=_parts(source),
                label=label,
                device=self._device,
            )

        if not slot.aligned:
            return tuple(map(load, sources))
        everyone = {source.model: load(source) for source in (*slot.aligned, *sources)}
        gather = Gather(thetas=tuple(everyone.values()), label=label)
        aligned: AlignThetas | TruncateThetas
        if self._tokens.tokenizer is None:
            aligned = TruncateThetas(gather_tensors=gather, weight_info=slot.weight)
        else:
            aligned = AlignThetas(
                gather_tensors=gather,
                tokenizer_task=self._tokens.tokenizer,
                tokens=dict(self._tokens.tokens),
                pad_to_multiple_of=self._tokens.multiple,
                base_model=slot.reader.base_model,
                vocabulary_axis=slot.weight.vocabulary_axis,
            )
        return tuple(
            PickTheta(model=source.model, name=source.tensor.name, aligned=aligned)
            for source in sources
        )

    def _rows(self, slot: Slot, source: Source) -> OwnRows:
        """Return the task that says which of a model's rows stands at each of the output's."""
        size, tokenizer = self._tokens.rows(slot), self._tokens.tokenizer
        if tokenizer is None:
            return FirstRows(size=size)
        forced = self._tokens.forced
        return TokenRows(model=source.model, tokenizer=tokenizer, size=size, forced=forced)

    def _aligned(
        self, slot: Slot, way: Way, index: int, loaded: tuple[LoadPrecision, ...]
    ) -> tuple[Precision, ...]:
        """Return the tasks that give what was measured of one model, for the output's tokens."""
        if not slot.aligned:
            return loaded
        source, factors = way.sources[index], way.factors[index]
        rows = self._rows(slot, source)
        if factors is None:
            axes = (slot.weight.vocabulary_axis,)
            return (AlignPrecision(precision=loaded[0], rows=rows, axes=axes),)

        def align(task: LoadPrecision) -> Precision:
            if not runs_along_tokens(slot, source, factors, task.name):
                return task
            if task.form == "diagonal":
                return AlignPrecision(precision=task, rows=rows, axes=(-2,))
            among = [self._rows(slot, s) for s in way.sources if isinstance(rows, TokenRows)]
            return AlignPrecision(precision=task, rows=rows, axes=(-2, -1), among=tuple(among))

        return tuple(map(align, loaded))

    def _present(self, slot: Slot, way: Way) -> tuple[OwnRows, ...]:
        """Return which rows the models have, where what was measured does not tell rows apart."""
        if not slot.aligned or self._tokens.tokenizer is None:
            return ()
        source, factors = way.sources[0], way.factors[0] if way.sidecars else None
        if factors is None:
            return ()
        if any(runs_along_tokens(slot, source, factors, name) for name in factors.names):
            return ()
        return tuple(self._rows(slot, source) for source in way.sources)

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
            "favor": values.counting.index(values.favored)
            if values.favored in values.counting
            else None,
        }
        accepted = _accepted(function)
        return tuple((name, value) for name, value in known.items() if name in accepted)


@functools.lru_cache(maxsize=16)
def _accepted(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


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
