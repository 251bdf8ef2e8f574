"""A Fisher merge beside mergekit's linear: time and memory, by size and number of the models.

    python tests/benchmarks/sizes.py

Models of Llama's architecture and their Fishers, random numbers in one dtype each, are merged by
mergekit's own code, every merge in a process of its own that begins with everything imported. Every
model has files of its own (eight of 2B and their Fishers take 63 GB). Linear and Fisher take turns.

`cached` is with the files in the system's cache, read there in order; files that would take more
than 85% of the memory that is free are not cached. `cold` is after the system was told to forget
them (`posix_fadvise`). Seconds are medians, `ratio` is the median of the rounds' ratios, `fastest`
that of the fastest rounds: a disk has no fastest time that is its own, for a virtual one's host may
have in its memory what it is asked for; and of a processor others take their part. `CPU` is the
ratio of the least CPU times. `read` is how many times linear's bytes a Fisher merge reads. Before
each merge free memory is filled with a cached file, as on a machine that has been in use: a virtual
one gives free memory back to its host, and waits longer for it than for the disk. Memory is the
most that a process held at any moment of a merge that is not timed above what it had before
(`RssAnon`: without mapped files, which the system takes back when it needs room), and `tensor` one
float32 copy of the largest tensor. The output is written in shards of `--shard` bytes, which
mergekit collects in memory.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from fisher_mergekit.sidecar.checkpoint import Checkpoint
from fisher_mergekit.sidecar.header import Measurement, ModelIdentity, Settings, WeightRecord
from fisher_mergekit.sidecar.writer import describe, write_sidecar

METHODS = ("linear", "fisher")
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["__main__", "fisher_mergekit.merging.planner"])
MIB = 1 << 20


@dataclass(frozen=True)
class Size:
    """Sizes of a model, as Llama's configuration has them."""

    name: str
    vocabulary: int
    width: int
    inner: int
    layers: int
    dtype: torch.dtype

    def config(self) -> LlamaConfig:
        """Return the configuration; embedding and head are tied, as in most small models."""
        return LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.width, intermediate_size=self.inner,
            num_hidden_layers=self.layers, num_attention_heads=self.width // 64,
            num_key_value_heads=max(1, self.width // 192), head_dim=64, tie_word_embeddings=True,
            architectures=["LlamaForCausalLM"], dtype=str(self.dtype).removeprefix("torch."),
        )  # fmt: skip


SIZES = [
    Size("0.1B float32", 49152, 576, 1536, 30, torch.float32),
    Size("0.1B bfloat16", 49152, 576, 1536, 30, torch.bfloat16),
    Size("0.5B float32", 49152, 1152, 3072, 32, torch.float32),
    Size("2B bfloat16", 49152, 2304, 9216, 24, torch.bfloat16),
]
SMALL = [Size("small float32", 256, 64, 128, 2, torch.float32)]
COLUMNS = (
    "models", "linear", "fisher", "ratio", "fastest", "CPU", "linear", "fisher", "ratio", "fastest",
    "read", "linear", "fisher", "tensor",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], help="sizes whose names begin so")
    parser.add_argument("--models", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=3, help="cached rounds (default: 3)")
    parser.add_argument("--cold", type=int, default=5, help="cold rounds (default: 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shard", type=int, default=200_000_000, help="bytes of an output shard")
    parser.add_argument("--folder", help="where to make the models (default: the system's)")
    parser.add_argument("--smoke", action="store_true", help="does it run? small models")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    print(f"threads: {options.threads}, torch {torch.__version__}, shards of {options.shard:,} B\n")
    print(f"{'':12}{'cached: seconds, Fisher / linear':>40}", end="")
    print(f"{'cold: seconds, Fisher / linear':>32}{'bytes':>8}{'peak memory, MiB':>24}")
    print(f"{'':4}" + "".join(f"{title:>8}" for title in COLUMNS))
    for size in SMALL if options.smoke else SIZES:
        if size.name.startswith(tuple(options.only)):
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                report(size, Path(folder), options)


def report(size: Size, folder: Path, options: Any) -> None:
    """Print the rows of one size."""
    models = make_all(size, folder, max(options.models))
    infos = [*Checkpoint(models[0]).values()]
    count, largest = sum(i.count for i in infos), max(i.count for i in infos)
    print(f"{size.name} ({count / 1e6:,.0f}M parameters, the largest tensor {largest / 1e6:,.1f}M)")
    for number in options.models:
        chosen = models[:number]
        found: dict[str, list[Merge]] = {method: [] for method in METHODS}
        cold: dict[str, list[Merge]] = {method: [] for method in METHODS}
        memory = {}
        bytes_read = [total(chosen), total(chosen) + total([m / "sidecar" for m in chosen])]
        fits = bytes_read[1] < psutil.virtual_memory().available * 85 // 100
        rounds = options.rounds if fits else 0
        if rounds:
            forget(folder)
            remember(chosen)
        for method in METHODS:
            watched = merge_alone(chosen, method, folder / "out", options, watch=True)
            memory[method] = watched.memory / MIB
        for _ in range(rounds):
            for method in METHODS:
                found[method].append(merge_alone(chosen, method, folder / "out", options))
        for _ in range(options.cold):
            for method in METHODS:
                forget(folder)
                cold[method].append(merge_alone(chosen, method, folder / "out", options, cold=True))
        cells = [str(number), *cells_of(found), cpu_of(found), *cells_of(cold)]
        cells.append(f"{bytes_read[1] / bytes_read[0]:.2f}")
        cells += [f"{memory[method]:,.0f}" for method in METHODS]
        cells.append(f"{4 * largest / MIB:,.0f}")
        print(f"{'':4}" + "".join(f"{cell:>8}" for cell in cells), flush=True)


def cells_of(found: dict[str, list[Merge]]) -> list[str]:
    """Return linear's and Fisher's seconds, by medians, and both ratios."""
    walls = [[merge.wall for merge in found[method]] for method in METHODS]
    if not all(walls):
        return [""] * 4
    linear, fisher = map(statistics.median, walls)
    ratio = statistics.median(b / a for a, b in zip(*walls, strict=True))
    fastest = min(walls[1]) / min(walls[0])
    return [f"{linear:.2f}", f"{fisher:.2f}", f"{ratio:.2f}", f"{fastest:.2f}"]


def cpu_of(found: dict[str, list[Merge]]) -> str:
    """Return the ratio of the least CPU times."""
    least = [min((merge.cpu for merge in found[method]), default=0.0) for method in METHODS]
    return f"{least[1] / least[0]:.2f}" if all(least) else ""


def make_all(size: Size, folder: Path, count: int) -> list[Path]:
    """Write two models with their Fishers, and the others as copies of them."""
    models = [folder / str(number) for number in range(count)]
    for number, model in enumerate(models):
        if number < 2:
            # In a process of its own, which gives its memory back.
            process = PROCESSES.Process(target=make, args=(size, model, number))
            process.start()
            process.join()
            if process.exitcode:
                sys.exit("a model could not be made")
        else:
            shutil.copytree(models[number % 2], model)
    return models


def make(size: Size, folder: Path, seed: int) -> None:
    """Write a model and its Fisher."""
    generator = torch.Generator().manual_seed(seed)
    config = size.config()
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}

    def drawn(scale: float) -> dict[str, torch.Tensor]:
        return {
            name: torch.randn(shape, generator=generator).mul_(scale).to(size.dtype)
            for name, shape in shapes.items()
        }

    save_file(drawn(0.02), folder / "model.safetensors", {"format": "pt"})
    fishers = {name: values.square_() for name, values in drawn(1e-4).items()}
    measurement = Measurement(
        settings=Settings(estimator="sampled", unit="sequence", likelihood="causal_lm"),
        calibration={},
        weights={name: WeightRecord.of(info) for name, info in Checkpoint(folder).items()},
        tensors=describe(fishers),
    )
    identity = ModelIdentity(reference=str(folder), architecture="LlamaForCausalLM")
    write_sidecar(folder / "sidecar", "fisher", identity, measurement, fishers)


def total(folders: Sequence[Path]) -> int:
    """Return the bytes of all tensors in the folders, not in their subfolders."""
    return sum(file.stat().st_size for f in folders for file in f.glob("*.safetensors"))


def forget(folder: Path) -> None:
    """Have the system forget the content of all files, once they are safe."""
    os.sync()
    for file in folder.rglob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def remember(folders: Sequence[Path]) -> None:
    """Have the system read all files in order, as it will map them in large pages.

    Twice: it prefers them then to what is read once, such as the file that fills its memory.
    """
    for file in [file for folder in folders for file in folder.rglob("*.safetensors")] * 2:
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass


def fill_memory(holes: Path, size: int) -> None:
    """Fill free memory with so many bytes of a file of holes: all of it, or it is used first.

    A virtual machine gives memory that is free for some seconds back to its host, and to get it
    again takes longer than to read the disk. Cached files stay, and make room at once.
    """
    with holes.open("ab") as file:
        file.truncate(size)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    with holes.open("rb") as file:
        start = 0
        while start < size:
            start += os.sendfile(nowhere, file.fileno(), start, size - start)
    os.close(nowhere)


@dataclass(frozen=True)
class Merge:
    """Seconds of one merge, and the bytes that it held at most if it was watched."""

    wall: float
    cpu: float
    memory: int


def merge_alone(
    models: Sequence[Path],
    method: str,
    out: Path,
    options: Any,
    *,
    cold: bool = False,
    watch: bool = False,
) -> Merge:
    """Merge in a process of its own; whether the files are not in the system's cache, is `cold`."""
    ours, theirs = PROCESSES.Pipe(duplex=False)
    given = (theirs, models, method, out, options.threads, options.shard, watch)
    process = PROCESSES.Process(target=_merge, args=given)
    os.sync()  # what an earlier merge has written
    if not options.smoke:  # other tests need it, too
        read = [*models, *(model / "sidecar" for model in models)]
        cached = 0 if cold else total(read)
        room = psutil.virtual_memory().available * 95 // 100 - cached
        fill_memory(out.with_name("holes"), max(0, room))
    process.start()
    theirs.close()
    try:
        found: Merge = ours.recv()
    except EOFError:
        sys.exit("a merge failed")
    process.join()
    shutil.rmtree(out)
    return found


def _merge(
    pipe: Any, models: Sequence[Path], method: str, out: Path, threads: int, shard: int, watch: bool
) -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    weight = "weight" if method == "linear" else "lambda"
    dtype = LlamaConfig.from_pretrained(models[0]).dtype
    recipe = {
        "merge_method": method,
        "models": [{"model": str(m), "parameters": {weight: 0.5}} for m in models],
        "dtype": str(dtype).removeprefix("torch."),
    }
    config = MergeConfiguration.model_validate(yaml.safe_load(yaml.safe_dump(recipe)))
    merge_options = MergeOptions(copy_tokenizer=False, quiet=True, out_shard_size=shard)
    with Peak() if watch else contextlib.nullcontext() as peak:  # watching takes time
        cpu, wall = time.process_time(), time.perf_counter()
        run_merge(config, str(out), merge_options)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    pipe.send(Merge(wall, cpu, peak.held if peak else 0))


class Peak:
    """The most that this process holds above what it had, looked at every few milliseconds.

    Attributes:
        held: bytes.
    """

    def __init__(self) -> None:
        self._before = anonymous()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.held = 0

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.held = max(self.held, anonymous() - self._before)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def anonymous() -> int:
    """Return the bytes that this process holds, without mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024


if __name__ == "__main__":
    main()
