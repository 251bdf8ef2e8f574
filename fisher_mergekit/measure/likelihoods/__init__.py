"""One file a head: what log p(y|x) is for a classifier, for a causal LM.

To add one, write a file here with a subclass of `Likelihood`; it is found by itself.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from fisher_mergekit.errors import MeasureError
from fisher_mergekit.measure.likelihoods.base import Likelihood

for _module in iter_modules(__path__, __name__ + "."):
    import_module(_module.name)


def likelihood_for(architecture: str, config: Any = None) -> Likelihood:
    """Return the likelihood of a transformers class, by the end of its name and its configuration.

    Raises:
        MeasureError: no file here knows this head, or there is none.
    """
    for likelihood in Likelihood.known:
        if likelihood.fits(architecture, config):
            return likelihood()
    if architecture.endswith("Model"):
        body = architecture.removesuffix("Model")
        raise MeasureError(
            f"{architecture} names no head, and a body alone predicts nothing: there is no "
            "log p(y|x) to measure. Measure and merge the models with a head, for example as "
            f"{body}ForMaskedLM or {body}ForSequenceClassification."
        )
    heads = ", ".join(sorted({head for known in Likelihood.known for head in known.heads}))
    raise MeasureError(
        f"no likelihood is known for {architecture}. Models that can be measured end in: {heads}."
    )
