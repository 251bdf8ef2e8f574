"""Which way each output tensor is merged: by the method's kind, by another's, or as a mean.

A kind describes some tensors and not others: a Gram has no biases. What it does not describe goes
the way that the recipe's `others` says, and so do embeddings, unless the recipe wants them merged
by the counts of their tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from mergekit.common import ModelReference

from fisher_mergekit.errors import some
from fisher_mergekit.merging.remedies import Remedies
from fisher_mergekit.merging.settings import TensorSettings
from fisher_mergekit.merging.sidecars import PRIOR_KIND, Key, squared_norm
from fisher_mergekit.merging.slots import Slot, Source, by_model, part_names
from fisher_mergekit.methods import EMBEDDINGS, OTHERS, Method
from fisher_mergekit.precision.fisher import root_mean_square
from fisher_mergekit.sidecar.header import FactorNames
from fisher_mergekit.sidecar.reader import Sidecar

Opened: TypeAlias = Mapping[Key, Sidecar]
"""The sidecars of a merge."""

IDENTITY = "identity"


@dataclass(frozen=True)
class Way:
    """How one output tensor is merged.

    Attributes:
        kind: which precision.
        sources: those that count; behind them the base, where it is a prior.
        keys: one a source, which of the sidecars; none for the identity.
        sidecars: likewise.
        has_base: whether the last source is the base, and the others' lambdas are absolute.
    """

    kind: str
    sources: tuple[Source, ...]
    keys: tuple[Key, ...] = ()
    sidecars: tuple[Sidecar, ...] = ()
    has_base: bool = False

    @property
    def is_copy(self) -> bool:
        """Whether only one source counts, which is then copied, whatever was measured of it."""
        return len(self.sources) == 1

    @property
    def factors(self) -> list[FactorNames | None]:
        """Each source's factors; None for one that has none of its own."""
        return [factors_of(*pair) for pair in zip(self.sidecars, self.sources, strict=True)]

    @property
    def input_axis(self) -> int:
        """The axis along which a matrix gets its inputs; of factors all models have the same."""
        factors = self.sidecars and self.factors[0]
        return factors.input_axis if factors else -1


@dataclass(frozen=True)
class Decision:
    """How everything is merged.

    Attributes:
        ways: of what several models have a part in, by the tensor's name: the output's, or a
            piece's of it. Anything else is copied.
        settings: likewise.
        scales: each precision's root mean square over everything that is merged by its kind.
        pieces: of outputs that are put together from merged pieces, those, by the output's name.
        opened: the sidecars.
    """

    ways: Mapping[str, Way] = field(default_factory=dict)
    settings: Mapping[str, TensorSettings] = field(default_factory=dict)
    scales: Mapping[Key, float] = field(default_factory=dict)
    pieces: Mapping[str, Sequence[Slot]] = field(default_factory=dict)
    opened: Opened = field(default_factory=dict)

    def copied_from(self, slot: Slot) -> ModelReference | None:
        """Return the one model that an output tensor is a copy of; None for any other tensor."""
        way = self.ways.get(slot.name)
        is_copy = slot.name not in self.pieces if way is None else way.is_copy
        return self.source_of(slot).model if slot.is_merged and is_copy else None

    def source_of(self, slot: Slot) -> Source:
        """Return the first source that counts; of what is not merged, the first."""
        settings = self.settings.get(slot.name)
        return slot.sources[settings.counting[0] if settings else 0]


def counting_models(
    slots: Iterable[Slot], resolved: Mapping[str, TensorSettings]
) -> list[ModelReference]:
    """Return the models that count in any of these outputs."""
    found = (slot.sources[i].model for slot in slots for i in resolved[slot.name].counting)
    return list(dict.fromkeys(found))


def is_weighed(slot: Slot, settings: TensorSettings, bases: Mapping[str, Source]) -> bool:
    """Whether an output tensor has more than one source that counts, and is no copy of one."""
    return len(settings.counting) > 1 or slot.name in bases


def keys_tried(
    slot: Slot, settings: TensorSettings, method: Method, bases: Mapping[str, Source]
) -> list[tuple[Key, ...]]:
    """Return by which sidecars a tensor may be merged: of each kind that is tried, one a source.

    Args:
        slot: a merged output tensor.
        settings: its own.
        method: the recipe's.
        bases: the base's tensors, where it is a prior; its sidecar comes last.
    """
    others = str(settings.options.get(OTHERS.name, OTHERS.default))
    models = [slot.sources[i].model for i in settings.counting]
    prior = ((bases[slot.name].model, PRIOR_KIND),) if slot.name in bases else ()
    kinds = [method.kind] if others == "mean" else [method.kind, others]
    return [(*((model, kind) for model in models), *prior) for kind in kinds]


def factors_of(sidecar: Sidecar, source: Source) -> FactorNames | None:
    """Return the factors that describe a model's tensor; None where it has none of its own."""
    factors: FactorNames | None = sidecar.measurement.factors.get(source.tensor.parts[0].name)
    return factors


def runs_along_tokens(slot: Slot, source: Source, factors: FactorNames, name: str) -> bool:
    """Whether a factor has a row for each token of a table whose rows are brought in line."""
    axis = slot.weight.vocabulary_axis if slot.aligned else None
    if axis is None:
        return False
    of_inputs: bool = axis - len(source.tensor.shape) == factors.input_axis
    return of_inputs == (name == factors.inputs)


def choose(
    merged: Sequence[Slot],
    resolved: Mapping[str, TensorSettings],
    method: Method,
    opened: Opened,
    remedies: Remedies,
    bases: Mapping[str, Source],
) -> tuple[dict[str, Way], list[str]]:
    """Choose each output tensor's way.

    Args:
        merged: the output tensors that several models have a part in, complete.
        resolved: the settings of each, by name.
        method: the recipe's.
        opened: all sidecars by which they may be merged; of copies, those that are there.
        remedies: for messages.
        bases: the base's tensors, where it is a prior.

    Returns:
        The ways by the output tensor's name, and what stands in them.
    """
    ways: dict[str, Way] = {}
    problems: list[str] = []
    converted: dict[str, Slot] = {}
    for slot in merged:
        settings = resolved[slot.name]
        ways[slot.name], *candidates = _candidates(slot, settings, method, opened, bases)
        for way in candidates:
            described = [_describes(*x) for x in zip(way.sidecars, way.sources, strict=True)]
            if not any(described):
                continue
            if not all(described):
                problems.append(_half(slot, way, described, remedies))
                break
            if any(way.factors):
                if not way.is_copy and any(source.is_made for source in way.sources):
                    converted[slot.name] = slot
                    break
                problem = _unlike(slot, way, remedies)
                if problem is not None:
                    problems.append(problem)
                    break
                if _is_embedding(way) and not settings.options.get(EMBEDDINGS.name):
                    continue
            ways[slot.name] = way
            break
    if converted:
        names = list(converted)
        first = next(s for s in converted[names[0]].sources if s.is_made)
        problems.append(
            f"transformers converts {some(names, 1)} of {first.model} while loading, and the "
            f"models' files hold it in different layouts, in which no {method.kind} fits the "
            "other. Save the models again with one version of transformers, or keep it out with "
            "`exclude:`."
        )
    return ways, problems


def scales_of(merged: Sequence[Slot], ways: Mapping[str, Way], opened: Opened) -> dict[Key, float]:
    """Return each precision's root mean square over everything that is merged by its kind.

    Every tensor that two or more models contribute to counts, also at lambda 0, so that the scale
    does not jump as a lambda reaches 0. A source that several outputs share is one tensor of the
    model, and counts once; so does one that the files hold under two names. The scale is computed
    from the tensors as stored, before transformers repacks them. It is 1 for a sidecar that
    describes nothing of what is merged.
    """
    scales = {}
    all_sources = {
        kind: by_model(
            source
            for slot in merged
            if any(of == kind for _, of in ways[slot.name].keys)
            for source in (ways[slot.name].sources[-1:] if kind == PRIOR_KIND else slot.sources)
        )
        for kind in dict.fromkeys(kind for _, kind in opened)
    }
    for (model, kind), sidecar in opened.items():
        sources = all_sources[kind].get(model, [])
        measured = [name for name in part_names(sources) if name in sidecar.weights]
        twins = {s.tensor.name: s.weight.tied_names or () for s in sources}
        once = [n for n in measured if not _is_again(sidecar, n, twins.get(n, ()), measured)]
        count = sum(math.prod(sidecar.measurement.weights[name].shape) for name in once)
        total = math.fsum(squared_norm(sidecar, name) for name in once)
        scales[model, kind] = root_mean_square(total, count) if once else 1.0
    return scales


def _candidates(
    slot: Slot,
    settings: TensorSettings,
    method: Method,
    opened: Opened,
    bases: Mapping[str, Source],
) -> list[Way]:
    """Return the ways that a tensor may go: first as a mean, then by each kind that is tried."""
    base = bases.get(slot.name)
    sources = tuple(slot.sources[i] for i in settings.counting)
    all_sources = sources if base is None else (*sources, base)
    ways = [Way(IDENTITY, all_sources, has_base=base is not None)]
    for keys in keys_tried(slot, settings, method, bases):
        if not opened.keys() >= set(keys):
            continue  # a copy, of a model that is weighed against no other
        own = tuple(opened[key] for key in keys)
        kind = keys[-1][1]  # with a base, `prior`
        ways.append(Way(kind, all_sources, keys, own, has_base=base is not None))
    return ways


def _describes(sidecar: Sidecar, source: Source) -> bool:
    """Whether a tensor of the model, or all that it is made of, was measured."""
    return all(part.name in sidecar.weights for part in source.tensor.parts)


def _is_embedding(way: Way) -> bool:
    return _is_table(way.sidecars[0], way.sources[0])


def _is_table(sidecar: Sidecar, source: Source) -> bool:
    """Whether what a weight got as inputs is known as counts, the diagonal of a matrix."""
    factors = factors_of(sidecar, source)
    if factors is None:
        return False
    return len(sidecar[factors.inputs].shape) < len(source.tensor.parts[0].shape)


def _is_again(sidecar: Sidecar, name: str, twins: Iterable[str], measured: Iterable[str]) -> bool:
    """Whether a tensor is in the files under another name too, one that it is tied to."""

    def checksums(weight: str) -> list[str]:
        return [sidecar.measurement.tensors[n].checksum for n in sidecar.stored(weight)]

    return any(
        twin != name and twin in measured and checksums(twin) == checksums(name) for twin in twins
    )


def _half(slot: Slot, way: Way, described: Sequence[bool], remedies: Remedies) -> str:
    having = way.sources[described.index(True)]
    lacking = way.sources[described.index(False)]
    reasons = way.sidecars[described.index(False)].measurement.unmeasured
    reason = reasons.get(lacking.tensor.parts[0].name, "it is missing there")
    if not way.sidecars[described.index(True)].measurement.factors:
        return (
            f"{slot.name} was measured in {having.model}, but not in {lacking.model} ({reason}). "
            "Keep it out with `exclude:`."
        )
    return (
        f"the {way.kind} of {having.model} describes {slot.name}, that of {lacking.model} does not "
        f"({reason}). Measure both alike ({remedies.of_all} --force), or keep it out with "
        "`exclude:`."
    )


def _unlike(slot: Slot, way: Way, remedies: Remedies) -> str | None:
    """Say in what the models' factors of one tensor differ, if in anything."""
    first: tuple[str, str] | None = None
    for sidecar, source in zip(way.sidecars, way.sources, strict=True):
        factors = factors_of(sidecar, source)
        said = "a number for each weight"
        if factors is not None:
            shapes = [
                f"{n.rpartition('.')[2]} "
                + str(
                    ["tokens"] * len(sidecar[n].shape)
                    if runs_along_tokens(slot, source, factors, n)
                    else list(sidecar[n].shape)
                )
                for n in factors.names
            ]
            said = f"{', '.join(shapes)} along axis {factors.input_axis}"
        if first is None:
            first = (said, str(source.model))
        elif said != first[0]:
            told = (
                f"the {way.kind} of {slot.name} is {first[0]} in {first[1]}, but {said} in "
                f"{source.model}."
            )
            pairs = zip(way.sidecars, way.sources, strict=True)
            if len({_is_table(*pair) for pair in pairs}) > 1:
                return (
                    f"{told} It is a table of tokens in one of them, and the head's matrix in the "
                    "other, as where embedding and head are tied in one model only. Save both with "
                    "one `tie_word_embeddings` and measure them again, or keep it out with "
                    "`exclude:`."
                )
            return (
                f"{told} Measure both alike ({remedies.of_all} --force), or save the "
                "models again with one version of transformers."
            )
    return None
