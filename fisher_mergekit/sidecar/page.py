"""The sidecar's README.md: a short model-card-like page, fit to publish."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fisher_mergekit.methods import METHODS
from fisher_mergekit.sidecar.header import NONE, Header, Measurement, Settings
from fisher_mergekit.sidecar.location import folder_name

KIND_NAMES = {
    "fisher": "diagonal Fisher information",
    "gram": "Gram matrices of the linear layers' inputs",
    "kfac": "Kronecker-factored Fisher information of the linear layers",
}

_DATA_FIRST = ("path", "name", "split", "text", "messages", "label", "optimizer", "steps")

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[^@]+)?", re.ASCII)
"""An owner and a name, perhaps with a revision; what begins with a dot, or has more parts, is a
folder."""

PAGE_NAME = "README.md"
PAGE_MARK = "library_name: fisher_mergekit"
"""By this line a page of ours is known."""

_PAGE = """\
---
{mark}
tags: [fisher-information, mergekit, merge]
---
# What {name} is sure of

These files hold statistics of **{links}**{revision} ({architecture}), measured once so that
anyone can merge the model weighted by what it knows, with
[mergekit](https://github.com/arcee-ai/mergekit) and `fisher_mergekit`. They contain no weights and
no text.

{kinds}
## Use

{use}
"""

_USE = """\
With `fisher_mergekit` installed, mergekit's own command reads them:

```yaml
# recipe.yml
merge_method: {method}
models:
  - model: {model}
    parameters: {{lambda: 0.5, sidecar: ./{folder}}}     # these files
  - model: ANOTHER
    parameters: {{lambda: 0.5}}                         # has a sidecar/ in its own folder
```

```sh
mergekit-yaml recipe.yml merged/
```

A folder called `{folder}/` in {where}, or in its repository on the Hub, is
found by itself; then leave `sidecar:` out. The merge checks that the model's weights are those that
were measured. `mergekit-fisher inspect ./{folder}` shows the content.\
"""

_USE_ADAPTER = """\
These are the adapter's own parameters, under the names in its files, measured on the model that it
was trained on. mergekit does not merge adapters by themselves: measure and merge `model+adapter`.
`mergekit-fisher inspect ./sidecar` shows the content.\
"""
_OF_ADAPTERS = "base_model.model."
"""How all names in an adapter's files begin."""

_KIND = """\
## `{kind}`: {long_name}

| | |
|---|---|
{rows}

"""


def render_page(header: Header) -> str:
    """Return the Markdown page of a sidecar; nothing in it has to be filled in to publish it."""
    model = header.model
    parts = model.reference.split("+")
    on_hub = all(map(is_hub_name, parts))
    # Where the model lies on its author's disk is of no use to anybody else.
    names = parts if on_hub else [Path(part).name for part in parts]
    revision = model.revision
    return _PAGE.format(
        mark=PAGE_MARK,
        name="+".join(names),
        links=" + ".join(map(_link, names) if on_hub else names),
        revision=f" at revision `{revision}`" if revision else "",
        architecture=model.architecture,
        kinds="".join(_kind(kind, m) for kind, m in sorted(header.kinds.items())),
        use=_use(header, "+".join(names) + (f"@{revision}" if revision else "") if on_hub else ""),
    )


def _use(header: Header, model: str) -> str:
    """Say what the files are good for.

    Args:
        header: the sidecar's.
        model: the model's name on the Hub, if it has one.
    """
    weights = [name for m in header.kinds.values() for name in m.weights]
    if weights and all(name.startswith(_OF_ADAPTERS) for name in weights):
        return _USE_ADAPTER
    base, is_pair, _ = header.model.reference.partition("+")
    methods = [row.name for row in METHODS.values() if row.kind in header.kinds] or ["fisher"]
    return _USE.format(
        method=methods[0] + "".join(f"     # or {', '.join(methods[1:])}" for _ in methods[1:2]),
        model=model or "MODEL",
        folder=folder_name(base if is_pair else None),
        where="the adapter's own folder" if is_pair else "the model's own folder",
    )


def is_hub_name(reference: str) -> bool:
    """Whether a model's reference is a name on the Hub, as far as can be told without asking it."""
    return bool(_HUB_NAME.fullmatch(reference)) and not Path(reference).exists()


def _link(name: str) -> str:
    path, _, revision = name.partition("@")
    return f"[{name}](https://huggingface.co/{path}{f'/tree/{revision}' if revision else ''})"


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
    short = f" (of at most {asked:,})" if asked and asked > settings.examples else ""
    return f"{settings.examples:,}{short}"


def _tokens(settings: Settings) -> str | None:
    if settings.tokens is None:
        return None
    return f"{settings.tokens:,}, at most {settings.max_length:,} an example"
