"""Planning a recipe of 80 layers reads headers and digests, and no tensor."""

from __future__ import annotations

from pathlib import Path

import mergekit.plan  # noqa: F401 - now, for our hook looks at what a test is going to replace
import pytest
from benchmarks import planning

from fisher_mergekit.merging.loading import LoadPrecision, LoadTheta, Together
from fisher_mergekit.merging.tasks import MergeTask
from fisher_mergekit.sidecar.checkpoint import Checkpoint

pytestmark = pytest.mark.slow  # exhaustive: not needed at every change

COUNTER = Path("/proc/self/io")
LAYERS = 80
TENSORS = LAYERS * 9 + 3


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models with sidecars: whole headers, and holes in place of numbers."""
    folders = [tmp_path_factory.mktemp("large") / name for name in ("one", "two")]
    for folder in folders:
        planning.make(folder, planning.SMALL)
    return folders


def bytes_read():
    return int(COUNTER.read_text().split()[1])  # rchar: all that was asked for by read()


TASKS = (MergeTask, LoadTheta, LoadPrecision)


@pytest.mark.parametrize(
    ("method", "sidecars"),
    [("fisher", TENSORS), ("regmean", LAYERS * 4 + 1), ("mats", LAYERS * 11 + 2)],
)
def test_no_tensor_is_read(models, method, sidecars, monkeypatch):
    def read(*_, **__):
        raise AssertionError("planning reads a tensor")

    monkeypatch.setattr(Checkpoint, "load", read)
    planned = planning.plan(models, method)
    loads = [t for task in planned.tasks if isinstance(task, Together) for t in task.tasks]
    counts = {kind: sum(isinstance(t, kind) for t in (*planned.tasks, *loads)) for kind in TASKS}
    assert counts == {MergeTask: TENSORS, LoadTheta: 2 * TENSORS, LoadPrecision: 2 * sidecars}


@pytest.mark.skipif(not COUNTER.exists(), reason="only Linux counts what a process reads")
def test_of_large_tensors_a_sample_is_read(models):
    """For the digest; once a model, whatever the number of layers that read it."""
    planning.plan(models, "fisher")  # imports what it needs
    before = bytes_read()
    planning.plan(models, "fisher")
    found = bytes_read() - before
    tensors = [info for model in models for info in Checkpoint(model).values()]
    sizes = [info.stop - info.start for info in tensors]
    sampled, whole = sum(n if n <= 1 << 20 else 1 << 16 for n in sizes), sum(sizes)
    assert sampled < found < sampled + (8 << 20)  # headers, indices and configurations
    assert found < 0.6 * whole
