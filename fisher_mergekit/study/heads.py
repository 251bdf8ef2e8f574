"""One model's body under another model's head.

Two tasks with heads of different size share a body. A model is asked about the *other* task by
putting its body under that task's head, and mergekit's `linear`, which cannot merge heads of
different size, is given bodies that all carry the same head.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"


def is_head(name: str, exclude: Sequence[str]) -> bool:
    """Return whether a tensor is excluded from the merge: its name contains one of the parts."""
    return any(part in name for part in exclude)


def graft(body: Path, head: Path, out: Path, *, exclude: Sequence[str] = ("classifier",)) -> None:
    """Write to `out` a copy of `head`'s model in which all but the head comes from `body`.

    Args:
        body: folder of the model that gives every tensor that is not excluded.
        head: folder of the model that gives the excluded tensors, config and tokenizer.
        out: a new folder; its sidecar, if `head` has one, is not copied: it is another model.
        exclude: name parts, as in a recipe.
    """
    shutil.copytree(head, out, ignore=shutil.ignore_patterns("sidecar"), dirs_exist_ok=True)
    tensors = load_file(head / WEIGHTS)
    donor = load_file(body / WEIGHTS)
    for name in tensors:
        if not is_head(name, exclude):
            tensors[name] = donor[name]
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
