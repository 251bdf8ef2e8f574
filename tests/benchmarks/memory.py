"""Peak memory of one way to go over one batch, in a process of its own.

The process is forked from one that has computed nothing. It loads the model, notes how much memory
it holds, and only then prepares the way and goes over the batch. What counts is the most that it
ever held above that level, while it prepared itself and while it went over the batch.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import resource
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import transformers

from cases import Case
from ways import Way

IMPORTED_ONCE = [
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mixtral.modeling_mixtral",
    "fisher_mergekit.measure.session",
    "fisher_mergekit.study.tasks",
    "kronfluence.analyzer",
    "nngeometry.metrics",
    "opacus.grad_sample",
]
"""By the process that all others are forked from; what is not installed is passed over."""


@dataclass(frozen=True)
class Peaks:
    """MiB above the loaded model.

    Attributes:
        preparing: installing hooks, verifying rules: once a model.
        running: going over batches.
    """

    preparing: float
    running: float


def peaks(case: Case, way: type[Way]) -> Peaks | None:
    """Return the peak memory of a way; None if it is unable to, or memory ran out."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    ours, theirs = context.Pipe(duplex=False)
    alone = replace(case, is_shared=True)  # not yet loaded
    arguments = (alone, way, torch.get_num_threads(), theirs)
    process = context.Process(target=_measure, args=arguments)
    process.start()
    theirs.close()
    try:
        found: Peaks | None = ours.recv()
    except EOFError:  # it died
        found = None
    process.join()
    return found


def _measure(case: Case, way: type[Way], threads: int, out: Connection) -> None:
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    case.batch  # noqa: B018 - loads the model
    _warm_up()
    _forget_peak()
    level = _held()
    try:
        running = way(case)
        preparing = _peak() - level
        _forget_peak()
        running.run()
    except Exception:  # the table of times says why
        out.send(None)
    else:
        out.send(Peaks(preparing / 1024, (_peak() - level) / 1024))


def _warm_up() -> None:
    """Let the libraries take what they keep."""
    for size in (8, 256):  # small products and large ones are different routines
        x = torch.randn(size, size, requires_grad=True)
        (x @ x).softmax(-1).sum().backward()


def _forget_peak() -> None:
    """Give back what is no longer used, and forget the highest mark so far, where Linux can."""
    gc.collect()
    trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    marks = Path("/proc/self/clear_refs")
    if marks.exists():
        marks.write_text("5")


def _peak() -> int:
    """Return the KiB held at most since `_forget_peak`."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _held() -> int:
    """Return the KiB held now, or where the system does not say, at most so far."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1])
    return _peak()
