"""Registers our methods with mergekit, and wraps `MergePlanner._plan` once, and its model card.

The start-up hook calls `register()` when `mergekit.merge_methods` has been executed, and `patch()`
when `mergekit.plan` has. At the time of the first call the second module may be half imported, so
nothing that `register()` touches imports `mergekit.plan`.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

from fisher_mergekit.errors import UnsupportedMergekit
from fisher_mergekit.methods import METHODS

SUPPORTED = ((0, 1, 5), (0, 2))
"""mergekit from the first version on, up to but not including the second."""

_PATCHED = "__fisher_mergekit__"


def register() -> None:
    """Register every row of `methods.METHODS` with mergekit; a second call does nothing.

    Raises:
        UnsupportedMergekit: a version, or an interface, that this package does not know; or
            somebody else's method already has one of our names.
    """
    check_version(metadata.version("mergekit"))
    try:
        from mergekit import merge_methods

        from fisher_mergekit.merging.method import PlannedMethod

        known = {method.spec.name: method for method in merge_methods.registered_methods()}
        for name, row in METHODS.items():
            if name not in known:
                merge_methods.register(PlannedMethod(row))
            elif not isinstance(known[name], PlannedMethod):
                raise UnsupportedMergekit(
                    f"mergekit already knows another merge method called {name!r} "
                    f"({type(known[name]).__module__}); fisher_mergekit does not replace it."
                )
    except (ImportError, AttributeError, TypeError) as error:
        raise _drifted(error) from error


def patch() -> None:
    """Let `MergePlanner._plan` hand recipes of ours to our planner; a second call does nothing.

    Recipes with any other method go to mergekit's own code, untouched.

    Raises:
        UnsupportedMergekit: the planner does not look as we know it.
    """
    try:
        from mergekit.plan import MergePlanner

        original = MergePlanner._plan
        if hasattr(original, _PATCHED):
            return
        check_interface(_interface())
    except (ImportError, AttributeError) as error:
        raise _drifted(error) from error

    @functools.wraps(original)
    def _plan(self: Any) -> None:
        if self.config.merge_method not in METHODS:
            original(self)
            return
        from fisher_mergekit.merging.planner import plan

        patch_card()
        plan(self, walk=functools.partial(original, self))

    setattr(_plan, _PATCHED, True)
    MergePlanner._plan = _plan


def patch_card() -> None:
    """Let `mergekit.merge` write our section into the cards of our recipes.

    This happens when the first recipe of ours is planned, so merges by other methods never see it.
    A mergekit that writes its cards elsewhere writes them without the section.
    """
    merge: Any = sys.modules.get("mergekit.merge")  # not there where merges stay in memory
    original = getattr(merge, "generate_card", None)
    if original is None or hasattr(original, _PATCHED):
        return

    @functools.wraps(original)
    def generate_card(config: Any, *args: Any, **kwargs: Any) -> str:
        if config.merge_method not in METHODS:
            card: str = original(config, *args, **kwargs)
            return card
        from fisher_mergekit.merging.card import generate

        return generate(original, config, *args, **kwargs)

    setattr(generate_card, _PATCHED, True)
    merge.generate_card = generate_card


def check_version(version: str) -> None:
    """Check a version of mergekit, such as `0.1.5`.

    Raises:
        UnsupportedMergekit: it is older or newer than those we support.
    """
    release = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    oldest, too_new = SUPPORTED
    if not oldest <= release < too_new:
        raise UnsupportedMergekit(
            f"mergekit {version} is installed; fisher_mergekit extends mergekit from "
            f"{_dotted(oldest)} up to, but not including, {_dotted(too_new)}. "
            f'Run: pip install "mergekit>={_dotted(oldest)},<{_dotted(too_new)}"'
        )


def check_interface(expected: Sequence[tuple[Callable[..., Any], Sequence[str]]]) -> None:
    """Check that each function takes the arguments, by name, that we call it with.

    Raises:
        UnsupportedMergekit: one does not.
    """
    for function, arguments in expected:
        missing = set(arguments) - set(inspect.signature(function).parameters)
        if missing:
            raise _drifted(f"{function.__qualname__} takes no {', '.join(sorted(missing))}")


def _interface() -> list[tuple[Callable[..., Any], Sequence[str]]]:
    """Return what we rely on in mergekit's planner and its surroundings."""
    from mergekit.config import ConfigReader
    from mergekit.io.tasks import LoaderCache
    from mergekit.parameter_resolver import resolve_parameter
    from mergekit.plan import MergePlanner
    from mergekit.tokenizer import PermutedVocabulary
    from mergekit.tokenizer.truncate import TruncatedVocabulary

    return [
        (MergePlanner.plan_tensor, ("weight", "weights_in", "models", "cfg_reader")),
        (MergePlanner.normalize_config, ()),
        (ConfigReader.parameter_sources, ("model",)),
        (resolve_parameter, ("parameter", "settings", "tensor_name", "t", "model")),
        (LoaderCache.get, ("model",)),
        (PermutedVocabulary.execute, ("tokenizer_info", "tensors")),
        (TruncatedVocabulary.execute, ("tensors",)),
    ]


def _drifted(what: object) -> UnsupportedMergekit:
    oldest, too_new = SUPPORTED
    return UnsupportedMergekit(
        f"the installed mergekit {metadata.version('mergekit')} has another interface than "
        f"fisher_mergekit knows ({what}). "
        f'Run: pip install --force-reinstall "mergekit>={_dotted(oldest)},<{_dotted(too_new)}"'
    )


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
