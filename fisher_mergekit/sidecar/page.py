"""The sidecar's README.md: a short model-card-like page, fit to publish."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from fisher_mergekit.sidecar.header import NONE, Header, Measurement, Settings

KIND_NAMES = {
    "fisher": "diagonal Fisher information",
    "gram": "Gram matrices of the linear layers' inputs",
    "kfac": "Kronecker-factored Fisher information of the linear layers",
}

_DATA_FIRST = ("path", "name", "split", "text", "messages", "label", "optimizer", "steps")

PAGE_NAME = "README.md"
PAGE_MARK = "library_name: fisher_mergekit"
"""By this line a page of ours is known."""

_PAGE = """\
---
{mark}
tags: [fisher, mergekit, merge]
---
# What {reference} is sure of

These files hold statistics of **{reference}**{revision} ({architecture}), measured once so that
anyone can merge the model weighted by what it knows, with
[mergekit](https://github.com/arcee-ai/mergekit) and `fisher_mergekit`. They contain no weights and
no text.

{kinds}
## Use

```sh
pip install fisher_mergekit
mergekit-yaml recipe.yml out/
```

with a recipe that names the model. A folder called `sidecar/` inside the model's own folder is
found by itself; elsewhere, write `parameters: {{sidecar: PATH}}` beside the model.
`mergekit-fisher inspect PATH` shows the content.
"""

_KIND = """\
## `{kind}`: {long_name}

| | |
|---|---|
{rows}

"""


def render_page(header: Header) -> str:
    """Return the Markdown page of a sidecar."""
    model = header.model
    return _PAGE.format(
        mark=PAGE_MARK,
        reference=model.reference,
        revision=f" at revision `{model.revision}`" if model.revision else "",
        architecture=model.architecture,
        kinds="".join(_kind(kind, m) for kind, m in sorted(header.kinds.items())),
    )


def _kind(kind: str, measurement: Measurement) -> str:
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts(measurement).items())
    long_name = KIND_NAMES.get(kind, kind)
    if measurement.settings.estimator == "adam":
        long_name = f"Adam's second moment, kept in training, in place of the {long_name}"
    return _KIND.format(kind=kind, long_name=long_name, rows=rows)


def facts(measurement: Measurement) -> dict[str, str]:
    """Return a measurement's provenance as short lines, for the page and for `inspect`."""
    settings = measurement.settings
    lines = {
        "calibration": _data(measurement.calibration),
        "examples": _examples(settings),
        "tokens": _tokens(settings),
        "likelihood": settings.likelihood,
        "estimator": settings.estimator,
        "unit": settings.unit,
        "seed": None if settings.seed is None else str(settings.seed),
        "dtype": f"{settings.dtype}, computed in {settings.compute_dtype}",
        "tensors": _tensors(measurement),
        "versions": ", ".join(f"{k} {v}" for k, v in sorted(measurement.versions.items())),
        "prompt": "masked" if settings.mask_prompt else None,
    }
    if settings.attn_implementation:
        lines["dtype"] = f"{lines['dtype']}, attention by {settings.attn_implementation}"
    return {name: line for name, line in lines.items() if line not in (None, NONE)}


def what_was_read(measurement: Measurement) -> str:
    """Return in a few words what a measurement saw."""
    settings = measurement.settings
    if settings.examples is None:
        return f"what {measurement.calibration.get('steps', 0):,} training steps left"
    return f"{settings.examples:,} examples ({settings.tokens:,} tokens)"


def _tensors(measurement: Measurement) -> str:
    count = f"{len(measurement.tensors):,}"
    if not measurement.factors:
        return count
    uses = Counter(name for record in measurement.factors.values() for name in record.names)
    shared = sum(1 for times in uses.values() if times > 1)
    of = f"{count} factors of {len(measurement.factors):,} weights"
    return of + (f", {shared:,} of them shared" if shared else "")


def _data(calibration: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} `{value}`"
        for key in (*_DATA_FIRST, *sorted(calibration.keys() - set(_DATA_FIRST)))
        if (value := calibration.get(key)) not in (None, False)
    )


def _examples(settings: Settings) -> str | None:
    if settings.examples is None:
        return None
    asked = settings.examples_requested
    short = f" (asked for {asked:,})" if asked and asked > settings.examples else ""
    return f"{settings.examples:,}{short}"


def _tokens(settings: Settings) -> str | None:
    if settings.tokens is None:
        return None
    return f"{settings.tokens:,}, at most {settings.max_length:,} an example"
