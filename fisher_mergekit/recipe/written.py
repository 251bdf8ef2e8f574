"""A recipe's text: what YAML makes of it, and what YAML itself loses in silence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

MERGE = "<<"


@dataclass(frozen=True)
class Written:
    """One recipe as it is written.

    Attributes:
        content: what YAML makes of it.
        anchors: keys of the first level under which there is something that is used elsewhere.
        repeated: what is wrong with keys that stand twice in one mapping.
    """

    content: Any
    anchors: frozenset[str]
    repeated: tuple[str, ...]


def read_text(text: str) -> Iterator[Written]:
    """Yield the recipes of a file; most have one.

    Raises:
        yaml.YAMLError: the text is not YAML.
        ValueError: it is, but something in it is no value, such as the 30th of February.
    """
    nodes = yaml.compose_all(text, Loader=yaml.SafeLoader)
    for content, node in zip(yaml.safe_load_all(text), nodes, strict=True):
        uses: Counter[int] = Counter()
        repeated = tuple(_walk(node, uses))
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()
        anchors = frozenset(str(k.value) for k, v in pairs if _is_used(v, uses))
        yield Written(content, anchors, repeated)


def _walk(node: Any, uses: Counter[int]) -> Iterator[str]:
    """Count how often each node is used, and tell of keys that stand twice."""
    uses[id(node)] += 1
    if uses[id(node)] > 1:
        return
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if key.value in seen and key.value != MERGE:
                yield (
                    f"line {key.start_mark.line + 1}: {key.value!r} stands in one block twice, and "
                    "only the last one counts. Keep one."
                )
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
            yield from _walk(value, uses)
    elif isinstance(node, yaml.SequenceNode):
        for part in node.value:
            yield from _walk(part, uses)


def _is_used(node: Any, uses: Counter[int]) -> bool:
    """Whether a node, or one in it, is used more than once."""
    if uses[id(node)] > 1:
        return True
    if isinstance(node, yaml.MappingNode):
        return any(_is_used(value, uses) for _, value in node.value)
    return isinstance(node, yaml.SequenceNode) and any(_is_used(part, uses) for part in node.value)
