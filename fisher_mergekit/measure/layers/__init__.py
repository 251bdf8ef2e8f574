"""One file a layer type: how a Linear, an Embedding, a norm … yields its per-example squares.

To add one, write a file here with a subclass of `Layer`; it is found by itself.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from torch import nn

from fisher_mergekit.measure.layers.base import Layer
from fisher_mergekit.measure.layers.local import Local

for _module in iter_modules(__path__, __name__ + "."):
    import_module(_module.name)


def layer_for(module: nn.Module) -> Layer:
    """Return the rule for a module's own parameters; where no file here knows it, `Local`."""
    for layer in Layer.known:
        if layer.matches(module):
            return layer()
    return Local()
