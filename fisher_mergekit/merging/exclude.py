"""Which tensors the recipe keeps out of the merge, and which line would keep others out.

A pattern is a part of a tensor's name, as in mergekit's own `filter`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fisher_mergekit.errors import nearest

_TELLS_NOTHING = frozenset({"weight", "bias"})


def is_excluded(name: str, patterns: Iterable[str]) -> bool:
    """Whether a tensor's name contains one of the patterns."""
    return any(pattern in name for pattern in patterns)


def unmatched(patterns: Iterable[str], names: Sequence[str]) -> list[str]:
    """Say which patterns are in no tensor's name, and what they may have meant."""
    known = [*dict.fromkeys(part for name in names for part in _parts(name)), *names]
    return [
        f"exclude: {pattern!r} is in the name of no tensor of this merge.{nearest(pattern, known)}"
        for pattern in patterns
        if not any(pattern in name for name in names)
    ]


def advice(
    offenders: Sequence[str],
    names: Sequence[str],
    present: Sequence[str],
    head: Sequence[str] = (),
    *,
    has_base: bool,
) -> str:
    """Return the sentence with the `exclude:` line that keeps the offenders out of the merge.

    Args:
        offenders: names of output tensors.
        names: names of all output tensors.
        present: the patterns that the recipe has already.
        head: those of the names that belong to a task head. Half a head is of no use, so an
            offender may take the rest of it along.
        has_base: whether the recipe names a `base_model`, which the line needs.
    """
    added = shortest_patterns(offenders, names, head)
    also = [name for name in names if name not in offenders and is_excluded(name, added)]
    also = [name for name in also if not is_excluded(name, present)]
    line = f"`exclude: [{', '.join(dict.fromkeys([*present, *added]))}]`"
    extra = f" (it takes {', '.join(also)} too)" if also else ""
    base = "" if has_base else ", and at the top `base_model:` with the model to take them from"
    return f"To keep base_model's own, write under `parameters:` the line {line}{extra}{base}."


def shortest_patterns(
    offenders: Sequence[str], names: Sequence[str], head: Sequence[str] = ()
) -> list[str]:
    """Return few and short patterns that match every offender and, if possible, nothing else.

    Where one offender's whole name is part of another tensor's (`classifier.weight` of
    `pre_classifier.weight`), no pattern can tell them apart, and the other is taken along; so is
    the rest of a task head.
    """
    allowed = {name for name in names if is_excluded(name, offenders)}
    if not allowed.isdisjoint(head):
        allowed.update(head)
    patterns: list[str] = []
    for offender in offenders:
        if is_excluded(offender, patterns):
            continue
        for candidate in _candidates(offender):
            if all(name in allowed for name in names if candidate in name):
                patterns.append(candidate)
                break
    return patterns


def _candidates(name: str) -> list[str]:
    """Return parts of a name, the most readable first; the last is the whole name."""
    pieces = name.split(".")
    prefixes = [".".join(pieces[: i + 1]) for i in range(len(pieces))]
    return [*_parts(name), *prefixes]


def _parts(name: str) -> list[str]:
    return [p for p in name.split(".") if not p.isdigit() and p not in _TELLS_NOTHING]
