"""How long planning takes for a large recipe: Llama-3.1-70B's shape, two models, no numbers.

    python tests/benchmarks/planning.py

Models and sidecars are sparse files: their headers are whole, their numbers were never written and
take no room on the disk, though they have 141 GB a model (bfloat16) and as much a Fisher. So what
is read of them is zeros; planning reads the headers, and of each tensor the 64 KiB that its digest
samples. `plan` is mergekit's planner with our part in it, `schedule` the order that mergekit puts
the tasks into, `linear` the same for its plain average. CPU time and the one on the wall.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fisher_mergekit.sidecar.checkpoint import Checkpoint
from fisher_mergekit.sidecar.header import (
    HEADER_NAME,
    FactorNames,
    Header,
    Measurement,
    ModelIdentity,
    PrecisionRecord,
    Settings,
    WeightRecord,
)

LARGE = {
    "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}  # fmt: skip
SMALL = {
    **LARGE, "vocab_size": 64, "hidden_size": 512, "intermediate_size": 2048,
    "num_attention_heads": 8, "num_key_value_heads": 2,
}  # fmt: skip
"""As deep, and narrow."""
KINDS = {"linear": None, "fisher": "fisher", "regmean": "gram", "mats": "kfac"}
SHARD = 5_000_000_000
BYTES = {"BF16": 2, "F32": 4}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rounds", type=int, default=2, help="the fastest counts (default: 2)")
    parser.add_argument("--smoke", action="store_true", help="does it run? narrow models")
    options = parser.parse_args(arguments)
    sizes = SMALL if options.smoke else LARGE
    with tempfile.TemporaryDirectory() as folder:
        models = [Path(folder) / name for name in ("one", "two")]
        for model in models:
            make(model, sizes)
        checkpoint = Checkpoint(models[0])
        count = sum(info.count for info in checkpoint.values()) / 1e9
        print(f"{sizes['num_hidden_layers']} layers, {count:.1f}B parameters, two models")
        print(f"\n{'seconds':10}{'plan':>16}{'schedule':>16}")
        print(f"{'':10}{'CPU':>8}{'wall':>8}{'CPU':>8}{'wall':>8}")
        for method in options.methods:
            rounds = [plan(models, method).seconds for _ in range(options.rounds)]
            print(f"{method:10}" + "".join(f"{min(x):8.2f}" for x in zip(*rounds, strict=True)))


def make(folder: Path, sizes: Mapping[str, Any]) -> None:
    """Write a model and its sidecars, all but the numbers."""
    folder.mkdir()
    config = LlamaConfig(**sizes, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in LlamaForCausalLM(config).named_parameters()}
    write_sparse(folder, "model", shapes, "BF16")
    weights = {name: WeightRecord.of(info) for name, info in Checkpoint(folder).items()}
    sidecar = folder / "sidecar"
    sidecar.mkdir()
    matrices = [n for n, shape in shapes.items() if len(shape) == 2 and "embed" not in n]
    grams = {f"{group_of(n)}.inputs": (shapes[n][1],) * 2 for n in matrices}
    outputs = {f"{n}.outputs": (shapes[n][0],) * 2 for n in matrices if "lm_head" not in n}
    outputs |= {f"{n}.outputs": shapes[n][:1] for n in matrices if "lm_head" in n}
    others = {n: "described by neither" for n in shapes if n not in matrices}
    kinds = {"fisher": measurement(weights, shapes)}
    write_sparse(sidecar, "fisher", shapes, "BF16")
    for kind, stored in {"gram": grams, "kfac": grams | outputs}.items():
        factors = {
            n: FactorNames(
                inputs=f"{group_of(n)}.inputs", outputs=f"{n}.outputs" if kind == "kfac" else None
            )
            for n in matrices
        }
        kinds[kind] = measurement(weights, stored, factors=factors, unmeasured=others)
        write_sparse(sidecar, kind, stored, "F32")
    identity = ModelIdentity(reference=str(folder), architecture="LlamaForCausalLM")
    header = Header(model=identity, kinds=kinds)
    (sidecar / HEADER_NAME).write_text(header.to_json() + "\n", encoding="utf-8")


def group_of(name: str) -> str:
    """Return a name for the layers that get the same inputs."""
    for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
        name = name.replace(part, "qkv" if part[0] in "qkv" else "gate_up")
    return name.removesuffix(".weight")


def measurement(
    weights: dict[str, WeightRecord], shapes: Mapping[str, Sequence[int]], **more: Any
) -> Measurement:
    """Return what a header would say of the tensors."""
    record = PrecisionRecord(checksum="0" * 32, sum_of_squares=1.0)
    return Measurement(
        settings=Settings(
            estimator="sampled", unit="sequence", likelihood="causal_lm", examples=1,
            tokens=1, max_length=1, seed=0,
        ),
        calibration={},
        weights={n: w for n, w in weights.items() if n not in more.get("unmeasured", {})},
        tensors=dict.fromkeys(shapes, record),
        **more,
    )  # fmt: skip


def write_sparse(folder: Path, stem: str, shapes: Mapping[str, Sequence[int]], dtype: str) -> None:
    """Write shards and their index, with holes for the numbers."""
    shards: list[dict[str, Any]] = []
    held = SHARD
    for name, shape in shapes.items():
        size = BYTES[dtype]
        for length in shape:
            size *= length
        if held + size > SHARD:
            shards.append({})
            held = 0
        shards[-1][name] = {"dtype": dtype, "shape": shape, "data_offsets": [held, held + size]}
        held += size
    index = {}
    for number, shard in enumerate(shards, 1):
        file = folder / f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        header = json.dumps(shard).encode()
        with file.open("wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
            stream.truncate(8 + len(header) + max(t["data_offsets"][1] for t in shard.values()))
        index |= dict.fromkeys(shard, file.name)
    content = json.dumps({"metadata": {}, "weight_map": index})
    (folder / f"{stem}.safetensors.index.json").write_text(content, encoding="utf-8")


@dataclass(frozen=True)
class Plan:
    """The tasks in order, and the seconds of planning and scheduling: CPU time, and on the wall."""

    tasks: list[Any]
    seconds: list[float]


def plan(models: Sequence[Path], method: str) -> Plan:
    """Plan, as mergekit-yaml does after it has read its recipe."""
    from mergekit.architecture import get_architecture_info
    from mergekit.config import MergeConfiguration
    from mergekit.graph import Executor
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import _model_out_config
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner

    weight = "weight" if method == "linear" else "lambda"
    recipe = {
        "merge_method": method,
        "models": [{"model": str(m), "parameters": {weight: 0.5}} for m in models],
        "dtype": "bfloat16",
    }
    config, options = MergeConfiguration.model_validate(recipe), MergeOptions(quiet=True)
    LoaderCache().setup(options)
    architecture = get_architecture_info(config, options)
    out = _model_out_config(config, architecture)
    planner = MergePlanner(config, architecture, options=options, out_model_config=out)
    targets, *planned = timed(lambda: planner.plan_to_disk(out_path="unused"))
    execution, *scheduled = timed(lambda: Executor(targets, "cpu", "cpu"))
    return Plan([handle.task() for handle in execution.schedule.tasks], [*planned, *scheduled])


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return what work returns, and how long it took."""
    cpu, wall = time.process_time(), time.perf_counter()
    found = work()
    return found, time.process_time() - cpu, time.perf_counter() - wall


if __name__ == "__main__":
    main()
