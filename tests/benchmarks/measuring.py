"""What measuring costs: the Fisher of MiniLM against an ordinary training step on the same batches.

    python tests/benchmarks/measuring.py

One table. Each row is one length, batch 16, two classes; the three columns are timed in turn, round
by round, so that a noisy machine is noisy for all of them. Ratios are medians over the rounds.
Needs the `demo` extra (the model).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForSequenceClassification

from fisher_mergekit.measure.batches import Example, collate
from fisher_mergekit.measure.estimators import estimator_for
from fisher_mergekit.measure.likelihoods import likelihood_for
from fisher_mergekit.measure.session import Session
from fisher_mergekit.study.tasks import minilm

BATCH = 16


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 128, 256])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2)
    session = Session(
        model=model,
        likelihood=likelihood_for("BertForSequenceClassification"),
        estimator=estimator_for("exact"),
        seed=0,
        pad_token_id=0,
        device=torch.device("cpu"),
    )
    print(f"MiniLM-L6, batch {BATCH}, {arguments.threads} threads, {arguments.rounds} rounds")
    print("tokens   step (s)   Fisher / step   batch-1 loop / step")
    for length in arguments.lengths:
        ids = torch.randint(1000, 20000, (BATCH, 1, length))
        examples = [
            Example(n, {"input_ids": row}, outcome=torch.tensor(n % 2)) for n, row in enumerate(ids)
        ]
        session.verify(examples)
        batch = collate(examples, 0)

        def step(batch=batch) -> None:
            model.requires_grad_(True)
            model.zero_grad(set_to_none=False)
            model(**batch.inputs, labels=batch.outcome).loss.backward()

        def fisher(batch=batch) -> None:
            model.requires_grad_(False)
            session._add_batch(batch)

        def loop(batch=batch) -> None:
            model.requires_grad_(True)
            for index in range(BATCH):
                single = batch.single(index)
                loss = model(**single.inputs, labels=single.outcome).loss
                for gradient in torch.autograd.grad(loss, list(model.parameters())):
                    gradient.square_()

        times = timed([step, fisher, loop], arguments.rounds)
        ratios = [
            statistics.median(a / b for a, b in zip(column, times[0], strict=True))
            for column in times[1:]
        ]
        middle = statistics.median(times[0])
        print(f"{length:6}   {middle:8.3f}   {ratios[0]:13.2f}   {ratios[1]:19.2f}", flush=True)


def timed(functions: list[Callable[[], None]], rounds: int) -> list[list[float]]:
    """Return each function's seconds in every round, after one round that is not counted."""
    times: list[list[float]] = [[] for _ in functions]
    for round_ in range(rounds + 1):
        for column, function in zip(times, functions, strict=True):
            start = time.perf_counter()
            function()
            if round_:
                column.append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main()
