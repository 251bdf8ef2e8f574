"""One file a layer type: how a Linear, an Embedding, a norm … yields its per-example squares.

To add one, write a file here with a subclass of `Layer`; it is found by itself.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from torch import nn

from fisher_mergekit.measure.layers.base import Layer

for _module in iter_modules(__path__, __name__ + "."):
    import_module(_module.name)


def layer_for(module: nn.Module) -> Layer | None:
    """Return the rule for a module's own parameters, or None if no file here knows it."""
    for layer in Layer.known:
        if layer.matches(module):
            return layer()
    return None
