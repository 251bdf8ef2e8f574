"""A recipe's text: what YAML makes of it, and what YAML itself loses in silence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import yaml

MERGE = "<<"

Uses: TypeAlias = "Counter[int]"
"""How often each node stands in another, by its id; one with an anchor may do so several times."""


@dataclass(frozen=True)
class Written:
    """One recipe as it is written.

    Attributes:
        content: what YAML makes of it.
        anchors: keys of the first level under which there is something that is used elsewhere.
        repeated: by keys of the first level, what is wrong with keys that stand twice there.
    """

    content: Any
    anchors: frozenset[str]
    repeated: tuple[tuple[str, str], ...]


def read_text(text: str) -> Iterator[Written]:
    """Yield the recipes of a file; most have one.

    Raises:
        yaml.YAMLError: the text is not YAML.
        ValueError: it is, but something in it is no value, such as the 30th of February.
        RecursionError: it is nested hundreds of levels deep.
    """
    nodes = yaml.compose_all(text, Loader=yaml.SafeLoader)
    for content, root in zip(yaml.safe_load_all(text), nodes, strict=True):
        pairs = root.value if isinstance(root, yaml.MappingNode) else []
        everywhere = _uses(root)
        anchors = {str(key.value) for key, value in pairs if _is_used(key, value, everywhere)}
        repeated = [(str(key.value), _told(key)) for key in _twice(root)]
        for first, value in pairs:
            for node in _nodes(value):
                repeated += [(str(first.value), _told(key)) for key in _twice(node)]
        yield Written(content, frozenset(anchors), tuple(dict.fromkeys(repeated)))


def _children(node: Any) -> list[Any]:
    if isinstance(node, yaml.MappingNode):
        return [value for _, value in node.value]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _nodes(root: Any) -> list[Any]:
    """Return a node and all that is in it, each once."""
    found = {id(root): root}
    waiting = [root]
    while waiting:
        for child in _children(waiting.pop()):
            if id(child) not in found:
                found[id(child)] = child
                waiting.append(child)
    return list(found.values())


def _uses(root: Any) -> Uses:
    return Counter(id(child) for node in _nodes(root) for child in _children(node))


def _is_used(key: Any, value: Any, everywhere: Uses) -> bool:
    """Whether something that is written under a key is used elsewhere, too."""
    inside = _uses(value)
    inside[id(value)] += 1
    return any(
        everywhere[id(node)] > inside[id(node)]
        for node in _nodes(value)
        if node.start_mark.index >= key.end_mark.index  # else it is only used here
    )


def _twice(node: Any) -> list[Any]:
    """Return the keys of a mapping that stand there a second time."""
    if not isinstance(node, yaml.MappingNode):
        return []
    seen, again = set(), []
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value != MERGE:
            again += [key] if (key.tag, key.value) in seen else []
            seen.add((key.tag, key.value))
    return again


def _told(key: Any) -> str:
    return (
        f"line {key.start_mark.line + 1}: {key.value!r} stands in one block twice, and only the "
        "last one counts. Keep one."
    )
