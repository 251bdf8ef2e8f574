"""The merged model's README.md: mergekit's own card, and what was measured of each model.

mergekit's card names the method and holds the recipe. What a reader cannot see there is what the
models were weighted by, so planning writes a section about it, which goes into the card when
mergekit comes to write it. A card is the last thing a merge does; nothing here may end a merge
that is done.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from mergekit import card as mergekit_card
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from fisher_mergekit import __version__
from fisher_mergekit.errors import some
from fisher_mergekit.merging.sidecars import PRIOR_KIND
from fisher_mergekit.merging.slots import Slot
from fisher_mergekit.merging.ways import IDENTITY, Decision
from fisher_mergekit.methods import METHODS
from fisher_mergekit.sidecar.header import NONE, Header
from fisher_mergekit.sidecar.page import KIND_NAMES

LOG = logging.getLogger(__name__)

TITLE = "### Measured precisions"
BEFORE = "### Configuration"
"""The heading of mergekit's card that our section goes before."""

PRIOR_PAPER = "https://arxiv.org/abs/2310.12808"
NOTHING = "–"
LISTED = 3
"""So many values of a parameter are listed; of more it is said that it varies."""

_planned: tuple[MergeConfiguration, str] | None = None


def note(config: MergeConfiguration, outputs: Sequence[Slot], decision: Decision) -> None:
    """Keep in mind what the card of this merge, the one that is being planned, is to say.

    Args:
        config: the recipe; mergekit asks for the card of this very object.
        outputs: the output's tensors.
        decision: how they are merged.
    """
    global _planned
    _planned = None
    try:
        _planned = (config, render(config, outputs, decision))
    except Exception:  # such as a header's content that no version of ours has written
        LOG.warning("The model card will not say what was measured.", exc_info=True)


def generate(
    original: Callable[..., str],
    config: MergeConfiguration,
    config_yaml: str,
    name: str | None = None,
) -> str:
    """Return mergekit's card with our section in it.

    Args:
        original: mergekit's `generate_card`; the rest is what it is called with.
        config: the recipe, in mergekit's normal form.
        config_yaml: its text.
        name: of the merged model.
    """
    section = _planned[1] if _planned is not None and _planned[0] is config else ""
    try:
        with _hub_may_be_away():
            page = original(config=config, config_yaml=config_yaml, name=name)
    except Exception as error:
        LOG.warning("mergekit could not write its model card (%s); a short one is written.", error)
        method = METHODS[config.merge_method]
        page = (
            f"# {name or 'Merged model'}\n\nMerged by mergekit's method "
            f"[{method.pretty_name}]({method.reference_url}).\n\n{BEFORE}\n\n"
            f"```yaml\n{config_yaml}\n```\n"
        )
    first, found, rest = page.partition(f"\n{BEFORE}\n")
    if not found:
        return f"{page.rstrip()}\n\n{section}" if section else page
    return f"{first}\n{section}{found}{rest}" if section else page


@contextlib.contextmanager
def _hub_may_be_away() -> Iterator[None]:
    """Take a path that is there for a local one, where the Hub cannot be asked about it.

    mergekit asks the Hub whether a folder called `a/b` is also a repository, to link to it, and
    without a network that would fail after everything has been merged.
    """
    original = mergekit_card.is_hf

    @functools.wraps(original)
    def is_hf(path: str) -> bool:
        try:
            return bool(original(path))
        except Exception as error:  # of the Hub's client: offline, no network, a proxy's answer
            LOG.debug("The Hub could not be asked about %s: %s", path, error)
            return False

    mergekit_card.is_hf = is_hf
    try:
        yield
    finally:
        mergekit_card.is_hf = original


def render(config: MergeConfiguration, outputs: Sequence[Slot], decision: Decision) -> str:
    """Return the section: a table by model and kind, and what was done with which tensors."""
    method = METHODS[config.merge_method]
    lambdas = _lambdas(outputs, decision)
    kinds = dict.fromkeys(s.kind for s in decision.opened.values())
    header = (
        *("model", "lambda", "kind", "estimator", "unit", "examples", "tokens", "data"),
        "revision",
    )
    rows = []
    for model, values in lambdas.items():
        of_model = [s for (m, kind), s in decision.opened.items() if m == model and kind in kinds]
        first = (_code(model), _range(values))
        rows += [(*first, *_provenance(s.header, s.kind)) for s in of_model]
        if not of_model:  # it counts beside no other
            rows.append((*first, *[NOTHING] * (len(header) - 2)))
    for (model, kind), sidecar in decision.opened.items():
        if kind == PRIOR_KIND:
            told = _provenance(sidecar.header, sidecar.kind)
            rows.append((f"{_code(model)}, the prior", NOTHING, *told))
    table = [header, ("---",) * len(header), *rows]
    lines = [
        TITLE,
        "",
        f"{_how(kinds)} Merged with `fisher_mergekit` {__version__}.",
        "",
        *("| " + " | ".join(row) + " |" for row in table),
        "",
        *(f"* {line}" for line in _remarks(config, outputs, decision)),
        *(f"* Parameters: {line}." for line in _parameters(method.shared_keys, decision)),
        "",
    ]
    return "\n".join(lines)


def _how(kinds: Iterable[str]) -> str:
    names = " and ".join(KIND_NAMES.get(kind, kind) for kind in kinds)
    if not names:
        return "Each tensor is a copy of one model's."
    return f"Each model counts by what was measured of it: {names}."


def _lambdas(outputs: Sequence[Slot], decision: Decision) -> dict[ModelReference, list[float]]:
    found: dict[ModelReference, list[float]] = {}
    for slot in outputs:
        if slot.is_merged:
            values = decision.settings[slot.name].lambdas
            for source, value in zip(slot.sources, values, strict=True):
                found.setdefault(source.model, []).append(value)
    return found


def _provenance(header: Header, kind: str) -> tuple[str, ...]:
    """Return what a sidecar's header says, from the kind on."""
    measurement = header.kinds[kind]
    settings = measurement.settings
    counts = (
        NOTHING if value is None else f"{value:,}" for value in (settings.examples, settings.tokens)
    )
    origin = measurement.calibration
    data = [str(origin[key]) for key in ("path", "name", "optimizer") if origin.get(key)]
    known = [_code(part) for part in data]
    known += [
        f"{key} {_code(origin[key])}"
        for key in ("split", "steps", "fingerprint")
        if origin.get(key) is not None
    ]
    revision = header.model.revision
    return (
        _code(kind),
        *(NOTHING if v == NONE else v for v in (settings.estimator, settings.unit)),
        *counts,
        ", ".join(known) or NOTHING,
        _code(revision) if revision else NOTHING,
    )


def _remarks(
    config: MergeConfiguration, outputs: Sequence[Slot], decision: Decision
) -> Iterator[str]:
    """Say of the output's tensors which were merged how."""
    method = METHODS[config.merge_method]
    ways = Counter(way.kind for way in decision.ways.values() if not way.is_copy)
    own_first = sorted(ways.keys() - {IDENTITY}, key=lambda k: (k != method.kind, k))
    merged = [
        f"{ways[kind]:,} by {'`fisher` and the prior' if kind == PRIOR_KIND else _code(kind)}"
        for kind in own_first
    ]
    means = ways[IDENTITY]
    if means:
        merged.append(f"{means:,} as the lambda-weighted mean")
    yield f"Merged tensors: {', '.join(merged) or 'none'}."
    if PRIOR_KIND in ways:
        yield (
            f"The Fisher of {_code(config.base_model)}, which the models were trained from, is a "
            f"[prior]({PRIOR_PAPER}); lambdas say how much of each model is added to it."
        )
    copied = Counter(map(decision.copied_from, outputs))
    del copied[None]
    if copied:
        of_models = ", ".join(f"{count:,} of {_code(model)}" for model, count in copied.items())
        yield f"Copied tensors, merged with no other: {of_models}."
    kept: dict[ModelReference, list[str]] = {}  # a slice may have a base_model of its own
    for slot in outputs:
        if slot.excluded and slot.sources:
            kept.setdefault(slot.sources[0].model, []).append(_code(slot.name))
    for model, names in kept.items():
        yield f"Not merged, but taken from {_code(model)}: {some(names)}."


def _parameters(keys: Iterable[str], decision: Decision) -> Iterator[str]:
    """Say what the method's parameters were, defaults included: other versions may have others."""
    options: list[Mapping[str, Any]] = [s.options for s in decision.settings.values()]
    told = []
    for key in keys:
        values = list(dict.fromkeys(json.dumps(o[key]) for o in options if key in o))
        if values:
            told.append(f"`{key}` {', '.join(values) if len(values) <= LISTED else 'varies'}")
    if told:
        yield ", ".join(told)


def _range(values: Sequence[float]) -> str:
    least, most = min(values), max(values)
    return f"{least:g}" if least == most else f"{least:g} to {most:g}"


def _code(value: object) -> str:
    """Return a value as code in a table's cell: headers may come from anywhere."""
    text = " ".join(str(value).split())
    return "`" + text.replace("`", "'").replace("|", "\\|") + "`"
