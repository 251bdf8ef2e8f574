"""What squaring each example's gradient costs on a GPU, at the shapes of a 7B model.

    python tests/benchmarks/gpu.py            # needs a CUDA GPU and its torch; some minutes
    python tests/benchmarks/gpu.py --smoke    # tiny shapes in Triton's interpreter; no GPU

The first table is of single products: the Triton kernel, the torch fallback, and the weight product
of cuBLAS, which is what an ordinary step pays in their place. `layer` is the whole layer, forward,
input gradient, and squares by the kernel, over the same layer's ordinary step; `error` the kernel's
relative error against float64. The second table is of a Llama of a few layers: all of its Fisher
(empirical) over its ordinary forward and backward pass.

Functions are timed in turn, round by round; times and ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (32000, 4096)]
"""`[out, in]` of Llama-2-7B: attention, up and gate, down, head."""

LENGTHS = [128, 512, 2048]
TOKENS = 16384
LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 4,
    "vocab_size": 32000,
}

SMOKE = {
    "SHAPES": [(70, 64)],
    "LENGTHS": [3, 20],
    "TOKENS": 20,
    "LLAMA": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "vocab_size": 100,
    },
}


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--smoke", action="store_true", help="does it run? tiny shapes, no GPU")
    arguments = parser.parse_args()
    if arguments.smoke:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported, by whomever
        globals().update(SMOKE)
        arguments.rounds = 1
        device = torch.device("cpu")
    elif torch.cuda.is_available():
        device = torch.device("cuda")
    else:
        sys.exit("There is no CUDA GPU here. To see that this script runs: add --smoke.")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    print(f"{where(device)}, {arguments.rounds} rounds, {TOKENS} tokens a batch\n")
    products(device, arguments.rounds)
    print()
    models(device, arguments.rounds)


def where(device: torch.device) -> str:
    """Say what is measured on, and with what."""
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter"
    return f"{name}, torch {torch.__version__}, triton {triton.__version__}"


def products(device: torch.device, rounds: int) -> None:
    """Print the table of single products."""
    from fisher_mergekit.measure import kernels
    from fisher_mergekit.measure.kernels.batched import add_squares_batched

    print(
        "   out     in  dtype     tokens  examples   cuBLAS (ms)  kernel / cuBLAS"
        "  torch / cuBLAS  layer    error"
    )
    for out, width in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            for length in LENGTHS:
                examples = max(2, TOKENS // length)
                x = torch.randn(examples, length, width, device=device, dtype=dtype)
                gradient = torch.randn(examples, length, out, device=device, dtype=dtype)
                weight = torch.randn(out, width, device=device, dtype=dtype) / width**0.5
                total = torch.zeros(out, width, device=device)

                def kernel(total=total, gradient=gradient, x=x) -> None:
                    kernels.add_squared_products(total, gradient, x)

                def torch_way(total=total, gradient=gradient, x=x) -> None:
                    add_squares_batched(total, gradient, x)

                def cublas(gradient=gradient, x=x) -> Tensor:
                    return gradient.flatten(0, 1).T @ x.flatten(0, 1)

                def both_ways(x=x, weight=weight, gradient=gradient) -> None:
                    torch.nn.functional.linear(x, weight)
                    gradient @ weight

                def layer(both_ways=both_ways, kernel=kernel) -> None:
                    both_ways()
                    kernel()

                def step(both_ways=both_ways, cublas=cublas) -> None:
                    both_ways()
                    cublas()

                kernel()
                error = relative_error(total, gradient, x)
                if kernels._broken:
                    sys.exit(f"The kernel does not work here: {kernels._broken[0]}")
                times = timed([cublas, kernel, torch_way, step, layer], rounds, device)
                print(
                    f"{out:6} {width:6}  {str(dtype)[6:]:8}  {length:6}  {examples:8}"
                    f"  {statistics.median(times[0]):12.3f}  {ratio(times[1], times[0]):15.2f}"
                    f"  {ratio(times[2], times[0]):14.2f}  {ratio(times[4], times[3]):5.2f}"
                    f"  {error:.1e}",
                    flush=True,
                )


def relative_error(total: Tensor, rows: Tensor, cols: Tensor) -> float:
    """Compare the last rows and columns, where edges are ragged, with float64."""
    corner = total[-64:, -64:].double()
    expected = torch.zeros_like(corner)
    for row, col in zip(rows[..., -64:].double(), cols[..., -64:].double(), strict=True):
        expected += (row.T @ col).square()
    return float((corner - expected).norm() / expected.norm())


def models(device: torch.device, rounds: int) -> None:
    """Print the table of whole models."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from fisher_mergekit.measure import kernels
    from fisher_mergekit.measure.batches import Example, collate
    from fisher_mergekit.measure.estimators import estimator_for
    from fisher_mergekit.measure.likelihoods import likelihood_for
    from fisher_mergekit.measure.likelihoods.causal_lm import next_tokens
    from fisher_mergekit.measure.session import Session

    config = LlamaConfig(**LLAMA, tie_word_embeddings=False, use_cache=False)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    count = sum(p.numel() for p in model.parameters())
    print(f"Llama, {config.num_hidden_layers} layers, {count / 1e6:.1f}M parameters, bfloat16")
    print("tokens  examples   step (ms)   Fisher / step   one at a time")
    for length in LENGTHS:
        ids = torch.randint(1, config.vocab_size, (max(2, TOKENS // 2 // length), length))
        examples = [
            Example(number, {"input_ids": row[None]}, *next_tokens(row))
            for number, row in enumerate(ids)
        ]
        session = Session(
            model=model,
            likelihood=likelihood_for("LlamaForCausalLM", config),
            estimator=estimator_for("empirical"),
            seed=0,
            pad_token_id=0,
            device=device,
        )
        session.verify(examples)
        batch = session.placed(collate(examples, 0))
        labels = batch.inputs["input_ids"]

        def step(batch=batch, labels=labels) -> None:
            model.requires_grad_(True)
            model.zero_grad(set_to_none=False)
            model(**batch.inputs, labels=labels).loss.backward()
            model.requires_grad_(False)

        def fisher(session=session, batch=batch) -> None:
            session._add_batch(batch)

        times = timed([step, fisher], rounds, device)
        slow = len(session.loose) + len(session.again)
        print(
            f"{length:6}  {len(ids):8}  {statistics.median(times[0]):10.1f}"
            f"   {ratio(times[1], times[0]):13.2f}   {slow:13}",
            flush=True,
        )
    if kernels._broken:
        sys.exit(f"The kernel does not work here: {kernels._broken[0]}")


def timed(
    functions: list[Callable[[], object]], rounds: int, device: torch.device
) -> list[list[float]]:
    """Return each function's milliseconds in every round, after two that are not counted."""
    times: list[list[float]] = [[] for _ in functions]
    for number in range(-2 if device.type == "cuda" else 0, rounds):
        for column, function in zip(times, functions, strict=True):
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if number >= 0:
                column.append(1000 * (time.perf_counter() - start))
    return times


def synchronize(device: torch.device) -> None:
    """Wait for the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(times: list[float], others: list[float]) -> float:
    """Return the median ratio of two columns."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


if __name__ == "__main__":
    main()
