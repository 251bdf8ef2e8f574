"""Merge fine-tuned models by what each one is sure of: an extension of mergekit.

After installation mergekit's own `mergekit-yaml` knows the methods of this package; the command
`mergekit-fisher` measures the models beforehand. This module is imported at every start of Python
(see `fisher_mergekit.startup`), so it imports nothing: public names are loaded when first used.
"""

__version__ = "0.1.0"

# Public name -> the module that defines it.
_LAZY = {
    "FisherMergekitError": "fisher_mergekit.errors",
}


def __getattr__(name: str) -> object:
    """Load a public name from its module on first use, and keep it."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
