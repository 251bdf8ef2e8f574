"""Recipes whose layers change places, and what they come to by hand.

A plan says for each output tensor which tensors of which models it is made of, with which lambdas;
the oracle knows nothing of slices.
"""

from __future__ import annotations

import re

import merge_oracle

LAYER = re.compile(r"\.(layers?|h|block)\.(\d+)\.")


def piece(*sources, **top):
    """Return a slice of (model, first layer, end, its parameters)."""
    entries = [
        {"model": str(model), "layer_range": [start, stop], "parameters": {"lambda": lam}}
        for model, start, stop, lam in sources
    ]
    return {"sources": entries, **top}


def sliced(*slices, method="fisher", **top):
    return {"merge_method": method, "dtype": "float32", "slices": list(slices), **top}


def at_layer(name, layer):
    return LAYER.sub(rf".\1.{layer}.", name)


def plan_of(names, layers, before, after):
    """Return the sources of every output tensor, as (model, name, lambda).

    Args:
        names: of one model; its layer 0 stands for all.
        layers: one list of (model, source layer, lambda) an output layer.
        before: what stands before the layers: one list of (model, lambda).
        after: what stands behind them.
    """
    plan = {}
    for name in names:
        found = LAYER.search(name)
        if found is None:
            outer = before if "embed" in name else after
            plan[name] = [(model, name, lam) for model, lam in outer]
        elif found[2] == "0":
            for index, sources in enumerate(layers):
                plan[at_layer(name, index)] = [(m, at_layer(name, i), x) for m, i, x in sources]
    return plan


def by_hand(plan, thetas, fishers, **options):
    """Merge by Fishers as the plan says.

    A source that is used twice counts once in its model's scale; a part by itself does not.
    """
    weighed = [parts for parts in plan.values() if len(parts) > 1]
    used = {m: list(dict.fromkeys(n for ps in weighed for i, n, _ in ps if i == m)) for m in
            range(len(thetas))}  # fmt: skip
    scales = [merge_oracle.scale(fishers[m], names) if names else 1 for m, names in used.items()]
    return {
        name: merge_oracle.merge_tensor(
            [thetas[m][n] for m, n, _ in parts],
            [fishers[m][n] for m, n, _ in parts],
            [lam for *_, lam in parts],
            [scales[m] for m, *_ in parts],
            **options,
        )
        for name, parts in plan.items()
    }
