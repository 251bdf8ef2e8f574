"""Labels as they stand in the data, to numbers: classes, several classes, numbers."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

from transformers import PretrainedConfig

from fisher_mergekit.errors import CalibrationError

_OWN = "Give data of the model's own task"
_REMEDY = "only the empirical estimator needs labels, for the others drop `label:`."


def class_index(label: Any, config: PretrainedConfig) -> int:
    """Return the class index of a label given as an index or a name.

    An index may also be `1.0` or `"1"`: a CSV with one empty cell reads its whole column so.

    Raises:
        CalibrationError: it is none of the model's classes, or could be two of them.
    """
    classes = config.num_labels
    if isinstance(label, str) and label in config.label2id:
        return int(config.label2id[label])
    index = whole_number(label)
    if index is not None and 0 <= index < classes:
        named = config.label2id.get(str(index), index)
        if named != index:
            raise CalibrationError(
                f"label {label!r} is the name of the model's class {named}, but also the index of "
                f"another, {config.id2label[index]!r}. Give names as text, or, as only the "
                "empirical estimator needs labels, drop `label:`."
            )
        return index
    names = ", ".join(str(config.id2label[i]) for i in range(min(classes, 8)))
    raise CalibrationError(
        f"label {label!r} is none of the model's {classes} classes (0 to {classes - 1}: {names}). "
        f"{'Write 1 for true and 0 for false' if isinstance(label, bool) else _OWN}; {_REMEDY}"
    )


def zeros_and_ones(label: Any, config: PretrainedConfig) -> list[float]:
    """Return one number a class, 1 if it is there, of a label of a multi-label classifier.

    Args:
        label: a list of as many zeros and ones as there are classes, or a list of those classes
            that are there, by name or index; a single class is a list of one.

    Raises:
        CalibrationError: it is neither, or could be both: with two classes or one, `[0, 1]` could
            mean either, so there it is always the list of zeros and ones.
    """
    classes = config.num_labels
    labels = list(label) if isinstance(label, (list, tuple)) else [label]
    if len(labels) == classes and all(x in (0, 1) and not isinstance(x, str) for x in labels):
        return [float(x) for x in labels]
    if classes <= 2 and not all(isinstance(x, str) for x in labels):
        raise CalibrationError(
            f"label {label!r} of a multi-label classifier of {classes} class(es): expected a list "
            f"of {classes} zeros and ones, or a list of names; {_REMEDY}"
        )
    found = [0.0] * classes
    for one in labels:
        found[class_index(one, config)] = 1.0
    return found


def numbers(label: Any, count: int) -> list[float]:
    """Return the `count` numbers that a regression observed.

    Raises:
        CalibrationError: not as many, or not numbers.
    """
    values = list(label) if isinstance(label, (list, tuple)) else [label]
    try:
        found = [float(x) for x in values]
    except (TypeError, ValueError):
        found = []
    if len(found) != count or not all(map(isfinite, found)):
        raise CalibrationError(
            f"label {label!r}: expected {'a number' if count == 1 else f'{count} numbers'}, for "
            f"this model is a regression; {_REMEDY}"
        )
    return found


def whole_number(label: object) -> int | None:
    """Return a label as a whole number, if it is one."""
    if isinstance(label, str):
        return int(label) if label.isdecimal() else None
    if isinstance(label, bool) or not isinstance(label, (int, float)) or label != label // 1:
        return None
    return int(label)


def is_words(value: object) -> bool:
    """Whether a value is a list of words."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(isinstance(word, str) and word.strip() for word in value)
    )
