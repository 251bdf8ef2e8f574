"""What a Fisher merge holds goes by the largest tensor, not by the models' number or depth."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmarks import sizes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path("/proc/self/status").exists(), reason="only Linux tells memory of files apart"
    ),
]

OPTIONS = SimpleNamespace(threads=1, shard=4_000_000, smoke=True)
ROOM = 24  # MiB, for the plan and what the allocator keeps; the models have hundreds


def peak(folder: Path, layers: int, count: int) -> tuple[float, float]:
    """Return how many MiB a merge of models of so many layers holds at most, and has to read."""
    size = sizes.Size("", 8192, 512, 1536, layers, torch.float32)
    models = sizes.make_all(size, folder, count)
    merge = sizes.merge_alone(models, "fisher", folder / "out", OPTIONS, watch=True)
    read = sizes.total(models) + sizes.total([model / "sidecar" for model in models])
    shutil.rmtree(folder)
    return merge.memory / sizes.MIB, read / sizes.MIB


@pytest.mark.parametrize(("layers", "count"), [(16, 2), (4, 8)])
def test_four_times_as_much_to_merge(tmp_path, layers, count):
    """One more copy of the largest tensor, 16 MiB, for each model would be seen."""
    small, little = peak(tmp_path / "small", 4, 2)
    large, much = peak(tmp_path / "large", layers, count)
    assert much - little > 10 * ROOM
    assert large < small + ROOM
