"""The way of GPUs, as far as it can be tried without one.

The kernel runs in Triton's interpreter (`kernel_laws.py`, in a process of its own) and is compiled
for GPUs that are not there. `tests/benchmarks/gpu.py` tries and times it on one that is.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fisher_mergekit.measure import kernels
from fisher_mergekit.measure.kernels.batched import add_squares_batched
from fisher_mergekit.measure.kernels.lookups import add_meeting

HERE = Path(__file__).parent


def dense(rows, cols):
    return torch.einsum("bto,bti->boi", rows.double(), cols.double())


@pytest.mark.slow
def test_kernel_keeps_its_laws_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / "kernel_laws.py"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"\d\d passed", run.stdout)
    assert "skipped" not in run.stdout


@pytest.mark.slow
def test_the_benchmark_runs():
    """It is for a GPU, which is seldom there when this code changes."""
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    script = HERE.parent / "benchmarks" / "gpu.py"
    run = subprocess.run(
        [sys.executable, script, "--smoke"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    products, models = run.stdout.split("Llama,")
    errors = [float(error) for error in re.findall(r"\d\.\de-\d\d", products)]
    assert len(errors) == 4
    assert max(errors) < 1e-5
    # Length, examples, milliseconds, ratio, and no parameter that goes a slower way.
    assert len(re.findall(r"^ +\d+ +\d+ +[\d.]+ +[\d.]+ +0$", models, re.M)) == 2, run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_tile_compiles(dtype, capability, tmp_path, monkeypatch):
    """To machine code, for two generations of GPUs: asynchronous loads, and nothing spilled."""
    triton = pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fisher_mergekit.measure.kernels import launch

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    kernel = launch.squares_kernel
    tensors = dict.fromkeys(("row_starts", "col_starts", "counts", "bounds"), "*i64")
    pointer = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    tensors.update(total="*fp32", rows=pointer, cols=pointer)
    tiles = launch.TILES[dtype]
    for tile in tiles if capability == 90 else tiles[:1]:
        constants = dict(
            BLOCK_O=tile.out,
            BLOCK_I=tile.width,
            BLOCK_T=launch.step_size(dtype, 512),
            BAND=launch.BAND,
            UNIT=16,
            PRECISION="tf32x3" if dtype == torch.float32 else "tf32",
            WIDEN=False,
            **dict.fromkeys(("total_stride_i", "row_stride_o", "col_stride_i"), 1),
        )
        names = kernel.arg_names
        source = ASTSource(
            fn=kernel,
            signature={
                name: "constexpr" if name in constants else tensors.get(name, "i32")
                for name in names
            },
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs={
                (place,): [["tt.divisibility", 16]]
                for place, name in enumerate(names)
                if name not in constants
            },
        )
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": tile.warps, "num_stages": tile.stages},
        )
        assert "cp.async" in compiled.asm["ptx"]
        if capability == 90:
            assert "wgmma.mma_async" in compiled.asm["ptx"]
            assert spilled_bytes(triton, compiled, tmp_path) == 0, tile
        # What a block of threads may have there.
        assert compiled.metadata.shared <= {80: 163, 90: 227}[capability] * 1024


def spilled_bytes(triton, compiled, folder):
    """Return how much of local memory the machine code uses, by Triton's own disassembler."""
    path = folder / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\d+)", usage.stdout)[1])


def test_a_cpu_keeps_its_own_way():
    total = torch.zeros(64, 64)
    rows, cols = torch.randn(2, 3, 64), torch.randn(2, 3, 64)
    assert not kernels.add_squared_products(total, rows, cols)
    assert not kernels.add_squared_segments(total[None], rows[0], cols[0], [0, 3])
    assert not total.any()


@pytest.mark.parametrize("elements", [30, 500, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batched_torch(elements, dtype):
    torch.manual_seed(0)
    rows, cols = torch.randn(5, 7, 11).to(dtype), torch.randn(5, 7, 13).to(dtype)
    start = torch.rand(11, 13)
    total = start.clone()
    add_squares_batched(total, rows, cols, elements)
    expected = start.double() + dense(rows, cols).square().sum(0)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lookups", [1, 6])
def test_products_meet_lookups(dtype, lookups):
    """A tied head, with ids that repeat within and between examples."""
    torch.manual_seed(0)
    rows, cols = torch.randn(4, 7, 9).to(dtype), torch.randn(4, 7, 5).to(dtype)
    ids, values = torch.randint(4, (4, lookups)), torch.randn(4, lookups, 5).to(dtype)
    products = dense(rows, cols)
    total = products.square().sum(0).float()
    add_meeting(total, rows, cols, ids, values)
    one_hot = torch.nn.functional.one_hot(ids, 9)
    expected = (products + dense(one_hot, values)).square().sum(0)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)


def test_uses_that_cancel_leave_nothing_negative():
    torch.manual_seed(0)
    rows, cols = torch.zeros(3, 4, 50), torch.randn(3, 4, 20)
    ids = torch.randint(50, (3, 4))
    rows.scatter_(2, ids[:, :, None], -1.0)  # P = -S, but for rounding
    total = torch.zeros(50, 20)
    add_squares_batched(total, rows, cols)
    before = total.clone()
    add_meeting(total, rows, cols, ids, cols)
    assert total.min() >= 0
    assert total.max() < 1e-5 * before.max()
