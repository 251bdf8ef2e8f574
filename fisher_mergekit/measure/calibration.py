"""Rows of a data set: the texts, chats or pictures, and labels, that a model is measured on."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fisher_mergekit.errors import CalibrationError, nearest
from fisher_mergekit.measure.labels import is_words
from fisher_mergekit.recipe import Calibration

LOG = logging.getLogger(__name__)

LOCAL_BUILDERS = {
    ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".txt": "text",
}  # fmt: skip
DEFAULT_EXAMPLES = 4096
"""As many as the first release of Fisher merging used at most."""


@dataclass(frozen=True)
class Row:
    """One example as it stands in the data.

    Attributes:
        text: a text, a pair, or a list of words.
        messages: a chat.
        label: what was observed: a class, numbers, a list, an answer; the head knows.
        choices: continuations of the text, one of which is right.
        image: a picture, in one of the ways that `datasets` gives it.
        number: its place in the data.
    """

    text: str | tuple[str, str] | list[str] | None
    messages: Sequence[Mapping[str, str]] | None
    label: Any
    choices: list[str] | None = None
    image: Any = None
    number: int = field(default=0, compare=False)


def load_rows(calibration: Calibration) -> list[Row]:
    """Load the first N rows of the split, or N drawn with the seed when `shuffle` is set.

    Raises:
        CalibrationError: no such data or column, nothing in it, or an empty text.
    """
    if calibration.path is None:
        raise CalibrationError(
            "no calibration data. Add `calibration: {path: …, text: …}` to the model in the recipe "
            "(or --path and --text)."
        )
    sources = (calibration.text, calibration.messages, calibration.image)
    if sum(source is not None for source in sources) != 1:
        raise CalibrationError(
            f"{calibration.path}: name either the text column(s), `text:` (--text), or the chat "
            "column, `messages:`, or the column of pictures, `image:`."
        )
    wanted = calibration.examples or DEFAULT_EXAMPLES
    records = _first(_load_dataset(calibration), wanted, calibration)
    if not records:
        raise CalibrationError(
            f"{calibration.path}: split {calibration.split!r} has no examples; there is nothing to "
            "measure on."
        )
    if calibration.examples is not None and len(records) < calibration.examples:
        LOG.warning(
            "%s has only %d examples, not the %d asked for; measuring on all of them.",
            calibration.path,
            len(records),
            calibration.examples,
        )
    return [_row(record, number, calibration) for number, record in enumerate(records)]


def _load_dataset(calibration: Calibration) -> Any:
    import datasets  # slow to import, and only needed here

    path = str(calibration.path)
    builder = LOCAL_BUILDERS.get(Path(path).suffix.lower())
    options: dict[str, Any] = {"split": calibration.split, "streaming": calibration.streaming}
    if builder is not None or Path(path).is_file():
        _check_file(Path(path), calibration)
        if Path(path).suffix.lower() == ".tsv":
            options["sep"] = "\t"
        if builder == "text":
            # A line may be empty; what it parts is not. Windows' editors begin a file with a mark.
            options |= {"sample_by": "paragraph", "encoding": "utf-8-sig"}
        path, options["data_files"] = str(builder), path
    elif (Path(path) / "state.json").is_file():  # a data set's own save_to_disk
        path, options["data_files"] = "arrow", sorted(map(str, Path(path).glob("*.arrow")))
    elif (Path(path) / "config.json").is_file():
        raise CalibrationError(
            f"calibration data {path} is a model's folder; name the file, or the data set, that "
            "the model is measured on."
        )
    else:
        options |= {"name": calibration.name, "data_files": calibration.data_files}
    level = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity_error()
    try:
        data = datasets.load_dataset(path, **options)
        return data.filter(_has_text) if builder == "text" else data
    except Exception as error:  # the library raises its own, the hub's, the file formats', …
        known = Path(path).exists() or path in LOCAL_BUILDERS.values() or path == "arrow"
        raise CalibrationError(
            f"cannot load calibration data {calibration.path}, split {calibration.split!r}"
            f"{'' if known else ' (there is no such local file or folder)'}: {_reason(error)}"
        ) from error
    finally:
        datasets.utils.logging.set_verbosity(level)


def _has_text(record: Mapping[str, Any]) -> bool:
    """Whether a paragraph is one: more empty lines at the end of a file than one are not."""
    return bool(record["text"].strip())


def _check_file(path: Path, calibration: Calibration) -> None:
    """Refuse a file that is missing, empty or of an unknown kind, and keys of data sets."""
    if not path.is_file():
        raise CalibrationError(f"calibration data {path} does not exist.")
    if path.suffix.lower() not in LOCAL_BUILDERS:
        raise CalibrationError(
            f"calibration data {path}: a file must end in one of {', '.join(LOCAL_BUILDERS)}."
        )
    if path.stat().st_size == 0:
        raise CalibrationError(f"calibration data {path} is empty (0 bytes).")
    for key in ("name", "data_files"):
        if getattr(calibration, key) is not None:
            raise CalibrationError(
                f"calibration data {path} is one local file, for which `{key}:` means nothing. "
                f"Remove `{key}:`, or name a data set as `path:`."
            )


def _reason(error: BaseException) -> str:
    """Return what went wrong at the bottom: `datasets` wraps it in 'An error occurred while …'.

    Its first line: of a folder without data the others are a table of whatever stands there.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    first, *others = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} …" if others else first


def _first(data: Any, count: int, calibration: Calibration) -> list[dict[str, Any]]:
    try:
        if calibration.shuffle:
            data = data.shuffle(seed=calibration.seed)
        return list(data.take(count) if calibration.streaming else _head(data, count))
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise CalibrationError(
            f"cannot read calibration data {calibration.path}: {error}"
        ) from error


def _head(data: Any, count: int) -> Iterable[dict[str, Any]]:
    head: Iterable[dict[str, Any]] = data.select(range(min(count, len(data))))
    return head


def _row(record: Mapping[str, Any], number: int, calibration: Calibration) -> Row:
    where = f"{calibration.path}, example {number}"

    def column(name: str) -> Any:
        if name not in record:
            raise CalibrationError(
                f"{calibration.path} has no column {name!r}.{nearest(name, record)} "
                f"Columns: {', '.join(record)}."
            )
        return record[name]

    def text(name: str) -> str:
        value = column(name)
        if not isinstance(value, str) or not value.strip():
            raise CalibrationError(f"{where}: column {name!r} holds no text, but {value!r}.")
        return value

    def texts(name: str) -> list[str]:
        value = column(name)
        if not is_words(value):
            raise CalibrationError(
                f"{where}: column {name!r} holds no list of texts, but {value!r}."
            )
        return list(value)

    label = None if calibration.label is None else column(calibration.label)
    if calibration.image is not None:
        image = column(calibration.image)
        if image is None:
            raise CalibrationError(f"{where}: column {calibration.image!r} is empty.")
        return Row(None, None, label, image=image, number=number)
    if calibration.messages is not None:
        messages = column(calibration.messages)
        if not _is_chat(messages):
            raise CalibrationError(
                f"{where}: column {calibration.messages!r} is no chat; expected a list of "
                "{role, content} entries."
            )
        return Row(None, messages, label, number=number)
    names = calibration.text
    assert names is not None
    if not isinstance(names, str):
        pair = text(names[0]), text(names[1])
        return Row(pair, None, label, number=number)
    if calibration.choices is not None:
        choices = calibration.choices
        several = texts(choices) if isinstance(choices, str) else [text(c) for c in choices]
        return Row(text(names), None, label, several, number=number)
    words = is_words(column(names))
    return Row(texts(names) if words else text(names), None, label, number=number)


def _is_chat(messages: Any) -> bool:
    """Whether a value is a list of messages that say something: a template writes None as text."""
    if not isinstance(messages, Sequence) or not messages:
        return False
    return all(
        isinstance(m, Mapping)
        and "role" in m
        and (m.get("content") is not None or m.get("tool_calls"))
        for m in messages
    )
