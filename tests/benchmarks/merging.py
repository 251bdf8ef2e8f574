"""What merging two models costs by each method: time, bytes read, memory, a billion parameters.

    python tests/benchmarks/merging.py --threads 1

Models of random weights are made, measured on random tokens (all three kinds in one pass), and
merged by mergekit's own code, each merge in a process of its own that has imported everything
before. `read` loads every tensor of the models and sidecars that a method needs, and does nothing
with it. Files are in the system's cache. With one thread the clock is the process's CPU time,
otherwise the one on the wall. Peak memory is that above the process before the merge; mapped files
count in it where they have been read.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from measuring import cells
from transformers import LlamaConfig, LlamaForCausalLM

from cases import Case
from fisher_mergekit.measure.measured import Measured, needs_of
from fisher_mergekit.measure.stored import stored
from fisher_mergekit.measure.subject import load_subject
from fisher_mergekit.sidecar.checkpoint import Checkpoint
from fisher_mergekit.sidecar.header import Measurement, ModelIdentity, Settings
from fisher_mergekit.sidecar.writer import describe, write_sidecar
from ways.ours import session_for

KINDS = ("fisher", "gram", "kfac")
METHODS = {"linear": (), "fisher": ("fisher",), "regmean": ("gram",), "mats": ("kfac",)}
"""mergekit's plain average and ours, and the kinds that they read."""
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["__main__", "mergekit.merge", "fisher_mergekit.merging.planner"])


@dataclass(frozen=True)
class Shape:
    """A model's sizes, and what it is measured on."""

    name: str
    sizes: dict[str, Any]
    examples: int
    tokens: int

    def load(self) -> LlamaForCausalLM:
        """Make the model, its weights at random."""
        return LlamaForCausalLM(LlamaConfig(**self.sizes))


SMOLLM2 = Shape(
    "SmolLM2-135M's shape",
    {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    16, 128,
)  # fmt: skip
TINYLLAMA = Shape(
    "two layers of TinyLlama-1.1B's shape",
    {
        "vocab_size": 4096, "hidden_size": 2048, "intermediate_size": 5632,
        "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    16, 128,
)  # fmt: skip
SMALL = Shape(
    "small",
    {
        "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False,
    },
    4, 8,
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="the fastest counts (default: 3)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="shapes whose name contains this")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--smoke", action="store_true", help="does it run? a small model")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    clock = "CPU time" if options.threads == 1 else "wall clock"
    print(f"{clock}, threads: {options.threads}, torch {torch.__version__}, fastest of")
    print(f"{options.rounds} rounds\n")
    titles = ["seconds", "/ linear", "/ read", "s / B", "read GB / B", "peak MiB"]
    print(cells("", titles))
    for shape in [SMALL] if options.smoke else [SMOLLM2, TINYLLAMA]:
        if options.only in shape.name:
            with tempfile.TemporaryDirectory() as folder:
                report(shape, Path(folder), options.methods, options.rounds, options.threads)


def report(shape: Shape, folder: Path, methods: Sequence[str], rounds: int, threads: int) -> None:
    """Print the rows of one shape."""
    kinds = [kind for kind in KINDS if any(kind in METHODS[method] for method in methods)]
    models = [folder / str(seed) for seed in (1, 2)]
    for seed, model in enumerate(models):
        alone(make, shape, model, seed, kinds, threads)  # which gives its memory back
    parameters = sum(info.count for info in Checkpoint(models[0]).values()) / 1e9
    print(f"\n{shape.name} ({1000 * parameters:.1f}M parameters, two models)", flush=True)
    linear = 0.0
    for method in methods:
        merges = [alone(merge, models, method, folder / "out", threads) for _ in range(rounds)]
        reads = [alone(read_all, models, method, threads) for _ in range(rounds)]
        seconds, memory = min(t for t, _ in merges), max(m for _, m in merges)
        linear = seconds if method == "linear" else linear
        texts = [f"{seconds:.2f}", f"{seconds / linear:.1f}" if linear else ""]
        texts += [f"{seconds / min(t for t, _ in reads):.1f}", f"{seconds / parameters:.0f}"]
        texts += [f"{size(models, method) / parameters / 1e9:.1f}", f"{memory:.0f}"]
        print(cells(f"  {method}", texts), flush=True)


def make(shape: Shape, folder: Path, seed: int, kinds: Sequence[str]) -> None:
    """Write a model and its sidecars."""
    torch.manual_seed(seed)
    shape.load().save_pretrained(folder)

    def load() -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(folder)

    case = Case(shape.name, load, shape.tokens, shape.examples)
    session = session_for(case, "sampled", kinds)
    squares = session.run(case.examples, "auto")
    settings = Settings(
        estimator="sampled", unit="sequence", likelihood="causal_lm", examples=shape.examples,
        tokens=shape.examples * shape.tokens, max_length=shape.tokens, seed=0,
    )  # fmt: skip
    # The session's own model, in which it was measured.
    subject = replace(load_subject(folder), model=session.model)
    measured = Measured(subject, squares, session.factors, settings, {})
    records = subject.weight_records()
    identity = ModelIdentity(reference=str(folder), architecture=subject.architecture)
    for place, kind in enumerate(kinds, start=1):
        measured.later = needs_of(kinds[place:])
        found = stored(kind, measured)
        measurement = Measurement(
            settings=settings,
            calibration={},
            weights={name: records[name] for name in found.weights},
            tensors=describe(found.tensors, found.matrices),
            factors=found.factors,
            unmeasured=found.undescribed,
        )
        write_sidecar(folder / "sidecar", kind, identity, measurement, found.tensors)


def files(models: Sequence[Path], method: str) -> list[Checkpoint]:
    """Return what a method reads."""
    kinds = METHODS[method]
    sidecars = [Checkpoint(model / "sidecar", kind) for model in models for kind in kinds]
    return [*map(Checkpoint, models), *sidecars]


def size(models: Sequence[Path], method: str) -> float:
    """Return how many bytes a method reads."""
    return sum(info.stop - info.start for f in files(models, method) for info in f.values())


def read_all(models: Sequence[Path], method: str) -> None:
    """Load every tensor that a method needs, and touch every number."""
    for checkpoint in files(models, method):
        for name in checkpoint:
            checkpoint.load(name).sum()


def merge(models: Sequence[Path], method: str, out: Path) -> None:
    """Merge, as mergekit-yaml does after it has read its recipe."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    weight = "weight" if method == "linear" else "lambda"
    recipe = {
        "merge_method": method,
        "models": [{"model": str(m), "parameters": {weight: 0.5}} for m in models],
        "dtype": "float32",
    }
    config = MergeConfiguration.model_validate(yaml.safe_load(yaml.safe_dump(recipe)))
    run_merge(config, str(out), MergeOptions(copy_tokenizer=False, quiet=True))


def alone(work: Any, *arguments: Any) -> tuple[float, float]:
    """Return the seconds, and the MiB above what was there before, of work in its own process."""
    ours, theirs = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_work, args=(theirs, work, arguments))
    process.start()
    theirs.close()
    try:
        found: tuple[float, float] = ours.recv()
    except EOFError:
        sys.exit("a merge failed")
    process.join()
    return found


def _work(pipe: Any, work: Any, arguments: tuple[Any, ...]) -> None:
    *given, threads = arguments
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = clock()
    work(*given)
    seconds = clock() - start
    pipe.send((seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))


if __name__ == "__main__":
    main()
