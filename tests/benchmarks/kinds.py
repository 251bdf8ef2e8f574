"""What each kind costs to measure, and how large its sidecar is.

    python tests/benchmarks/kinds.py                # a quarter of an hour
    python tests/benchmarks/kinds.py --only MiniLM --rounds 15

A row is one model and one length; the columns are an ordinary forward pass, `gram` (forward only),
an ordinary training step (`step`), `fisher`, `kfac`, and all three kinds in one pass. They are
timed in turn, as in `measuring.py`; of each round's ratio to the forward pass the median is shown,
and below it the ratio of the fastest passes. `limit` is what the multiplications allow: of a layer
with i inputs and o outputs, i² / 2 a token for its Gram, a symmetric matrix, and i o for the layer.
Peak memory is that above the loaded model; that of a kind includes its sums.

Below, the sizes of the sidecars, also per billion of parameters, float32. Needs the `demo` extra.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence

import torch
import transformers
from measuring import cells, timed
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from cases import Case, cases, smoke_cases
from fisher_mergekit.measure.factors import WIDEST
from memory import peaks
from ways import Step, Way
from ways.ours import KFAC, Fisher, Gram, Together
from ways.plain import Forward

KINDS: tuple[type[Way], ...] = (Forward, Gram, Step, Fisher, KFAC, Together)
SIBLINGS = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}, {"query", "key", "value"})
"""Layers that get the same inputs, by their names in one module."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="at most (default: 9)")
    parser.add_argument("--seconds", type=float, default=60, help="for a row's rounds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--smoke", action="store_true", help="does it run? tiny models")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    print(f"threads: {options.threads}, torch {torch.__version__}\n")
    print(cells("", ["limit", *(way.title for way in KINDS)]))
    every = (smoke_cases if options.smoke else cases)()
    # Experts are no modules, so their limit is not counted here.
    chosen = [c for c in every if c.classes <= 2 and "mixt" not in c.name.lower()]
    for case in (c for c in chosen if options.only in c.name):
        times = timed([way(case) for way in KINDS], options.rounds, options.seconds, clock)
        first = times[Forward.title]
        print(f"\n{case.name} (forward {statistics.median(first):.3f} s, {len(first)} rounds)")
        ratios = [[a / b for a, b in zip(t, first, strict=True)] for t in times.values()]
        medians = [f"{statistics.median(r):.2f}" for r in ratios]
        print(cells("  time / forward", [f"{limit(case):.2f}", *medians]))
        fastest = [f"{min(t) / min(first):.2f}" for t in times.values()]
        print(cells("    fastest / fastest", ["", *fastest]), flush=True)
        if not options.no_memory:
            found = [peaks(case, way) for way in KINDS]
            texts = ["" if x is None else str(round(x.running)) for x in found]
            print(cells("  peak memory (MiB)", ["", *texts]), flush=True)
    print("\n", *sizes(options.smoke), sep="\n")


def limit(case: Case) -> float:
    """Return what multiplications alone allow the Gram to cost, in forward passes."""
    model = case.copy()
    moments: dict[object, int] = {}

    def add(module: nn.Linear, args: tuple[Tensor], _: Tensor) -> None:
        moments[given[module]] = args[0].numel() * module.in_features

    given = _by_inputs(model)
    hooks = [module.register_forward_hook(add) for module in given]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**case.batch.inputs)
    for hook in hooks:
        hook.remove()
    return 1 + sum(moments.values()) / counter.get_total_flops()  # which count two an element


def _by_inputs(model: nn.Module) -> dict[nn.Linear, object]:
    """Return, for each linear layer, a key that all with the same inputs have in common."""
    found: dict[nn.Linear, object] = {}
    for name, module in model.named_modules():
        parent, _, own = name.rpartition(".")
        siblings = [index for index, names in enumerate(SIBLINGS) if own in names]
        if isinstance(module, nn.Linear):
            found[module] = (parent, *(siblings or [own]))
    return found


def sizes(smoke: bool) -> Iterator[str]:
    """Yield the lines of the table of sizes."""
    llama = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    models = {case.model_name: case.model for case in (smoke_cases() if smoke else cases())}
    models = {name: model for name, model in models.items() if "mixt" not in name.lower()}
    with torch.device("meta"):
        models["Llama-3.1-8B's shape"] = LlamaForCausalLM(llama)
    yield cells("GB (a billion parameters)", ["", "fisher", "gram", "kfac"])
    for name, model in models.items():
        parameters = sum(p.numel() for p in model.parameters())
        found = [4 * x / 1e9 for x in (parameters, *_factor_sizes(model))]
        texts = [f"{x:.1f} ({x / parameters * 1e9:.1f})" for x in found]
        yield cells(f"  {name}", ["", *texts])


def _factor_sizes(model: nn.Module) -> tuple[int, int]:
    """Return how many numbers the input factors have, and all factors."""
    layers = _by_inputs(model)
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    inputs = {key: module.in_features**2 for module, key in layers.items()}
    outputs = [m.out_features if m.out_features > WIDEST else m.out_features**2 for m in layers]
    outputs += [table.embedding_dim**2 for table in tables]
    first = sum(inputs.values()) + sum(table.num_embeddings for table in tables)
    return first, first + sum(outputs)


if __name__ == "__main__":
    main()
