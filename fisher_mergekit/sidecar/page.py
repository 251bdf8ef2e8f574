"""The sidecar's README.md: a short model-card-like page, fit to publish."""

from __future__ import annotations

from fisher_mergekit.sidecar.header import Header, Measurement

KIND_NAMES = {"fisher": "diagonal Fisher information"}

_DATA_FIRST = ("path", "name", "split", "text", "messages", "label")

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
[mergekit](https://github.com/arcee-ai/mergekit) and `fisher_mergekit`. They are means over
calibration examples; they contain no weights and no text.

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
    return _KIND.format(kind=kind, long_name=KIND_NAMES.get(kind, kind), rows=rows)


def facts(measurement: Measurement) -> dict[str, str]:
    """Return a measurement's provenance as short lines, for the page and for `inspect`."""
    settings = measurement.settings
    asked = settings.examples_requested
    short = f" (asked for {asked:,})" if asked and asked > settings.examples else ""
    data = ", ".join(
        f"{key} `{value}`"
        for key in (*_DATA_FIRST, *sorted(measurement.calibration.keys() - set(_DATA_FIRST)))
        if (value := measurement.calibration.get(key)) not in (None, False)
    )
    lines = {
        "calibration": data,
        "examples": f"{settings.examples:,}{short}",
        "tokens": f"{settings.tokens:,}, at most {settings.max_length:,} an example",
        "likelihood": settings.likelihood,
        "estimator": settings.estimator,
        "unit": settings.unit,
        "seed": str(settings.seed),
        "dtype": f"{settings.dtype}, computed in {settings.compute_dtype}",
        "tensors": f"{len(measurement.tensors):,}",
        "versions": ", ".join(f"{k} {v}" for k, v in sorted(measurement.versions.items())),
    }
    if settings.attn_implementation:
        lines["dtype"] += f", attention by {settings.attn_implementation}"
    if settings.mask_prompt:
        lines["prompt"] = "masked"
    return lines
