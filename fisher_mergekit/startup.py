"""The start-up hook: plain mergekit learns our merge methods, and nothing else notices.

Two small files in site-packages are read whenever Python starts. `fisher_mergekit.pth` leaves a
placeholder on `sys.meta_path` that calls `start()` at the first import of mergekit;
`fisher_mergekit.start` (PEP 829, Python 3.15) calls `start()` straight away. It puts a finder on
`sys.meta_path` that waits for two modules of mergekit and acts once each has been executed:

    mergekit.merge_methods   ->  fisher_mergekit.merging.install.register()
    mergekit.plan            ->  fisher_mergekit.merging.install.patch()

Two events, because `mergekit.plan` imports `mergekit.merge_methods` at its top: when the first is
complete, the second may be half imported. Afterwards both finders are gone.

A Python that never imports mergekit loads nothing of ours (from 3.15 on, two tiny modules). A
failure of ours never disturbs mergekit: it is kept, and raised only when somebody asks for one of
our methods.

Set `FISHER_MERGEKIT_DISABLE=1` in the environment to switch the hook off; our methods are then
unknown to mergekit. Where start-up files are not read (a package found through `PYTHONPATH`,
`python -S`), call `start()` by hand, before or after mergekit is imported.
"""

import os
import sys
from _thread import get_ident

TYPE_CHECKING = False  # typing itself would be one more import at every start of Python
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any, NoReturn

METHODS = ("fisher", "regmean", "mats")
"""Names of our merge methods: the ones that report a failed hook when they are used."""

OFF_SWITCH = "FISHER_MERGEKIT_DISABLE"
"""Environment variable; anything but nothing or `0` leaves mergekit as it is."""

ACTIONS = {"mergekit.merge_methods": "register", "mergekit.plan": "patch"}
"""Module of mergekit -> the function of `merging.install` to call once it is executed."""

_watcher: "Watcher | None" = None


def start(placeholder: object = None) -> None:
    """Begin to wait for mergekit, or act at once where it is already imported.

    Safe to call any number of times (both start-up files may be read); never raises.

    Args:
        placeholder: the finder that the `.pth` file left, to be removed with our own.
    """
    global _watcher
    if _watcher is not None or os.environ.get(OFF_SWITCH, "0") not in ("", "0"):
        return
    _watcher = Watcher(placeholder)
    _watcher.install()


class Watcher:
    """A finder that lets the others find mergekit's modules, and acts after they are executed.

    Attributes:
        placeholder: the `.pth` file's finder, or None.
        awaited: modules that have not been executed yet.
        failure: the first exception of ours, or None.
    """

    def __init__(self, placeholder: object = None) -> None:
        self.placeholder = placeholder
        self.awaited = list(ACTIONS)
        self.failure: Exception | None = None
        self._finding: set[tuple[str, int]] = set()
        self._events: list[str] = []
        self._acting = False

    def install(self) -> None:
        """Go to the front of `sys.meta_path`; act at once on what is already imported."""
        sys.meta_path.insert(0, self)
        for name in ACTIONS:
            if name in sys.modules:
                self._executed(name)

    def find_spec(
        self,
        name: str,
        path: "Sequence[str] | None" = None,
        target: "ModuleType | None" = None,
    ) -> "ModuleSpec | None":
        """Return the ordinary spec of an awaited module, its loader set to tell us when done."""
        if name not in self.awaited:
            return None
        # Another finder may ask everybody else, us included, while we ask everybody else.
        key = (name, get_ident())
        if key in self._finding:
            return None
        self._finding.add(key)
        try:
            spec = _find_elsewhere(self, name, path, target)
        finally:
            self._finding.discard(key)
        if spec is not None and spec.loader is not None:
            try:
                self._listen(spec.loader, name)
            except Exception as error:  # a loader that takes no attributes
                self.failure = self.failure or error
        return spec

    def _listen(self, loader: "Any", name: str) -> None:
        """Wrap `exec_module` on this one loader object: class, source and tracebacks stay."""
        original = loader.exec_module

        def exec_module(module: "ModuleType") -> None:
            original(module)
            if module.__name__ == name:  # one zipimporter loads all modules of its archive
                if loader.__dict__.get("exec_module") is exec_module:
                    del loader.exec_module
                self._executed(name)

        loader.exec_module = exec_module

    def _executed(self, name: str) -> None:
        """Act on an executed module; what is executed meanwhile (by us) has to queue."""
        if name not in self.awaited:
            return
        self.awaited.remove(name)
        self._events.append(name)
        if self._acting:
            return
        self._acting = True
        try:
            while self._events and self.failure is None:
                self._act(self._events.pop(0))
        finally:
            self._acting = False
        if not self.awaited or self.failure is not None:
            # Here and not while a finder is asked: Python is not iterating over the list now.
            ours = (self, self.placeholder)
            sys.meta_path[:] = [finder for finder in sys.meta_path if finder not in ours]

    def _act(self, name: str) -> None:
        try:
            from fisher_mergekit.merging import install

            getattr(install, ACTIONS[name])()
        except Exception as error:
            self.failure = error
            _report_on_use(error)


def _find_elsewhere(
    watcher: Watcher, name: str, path: "Sequence[str] | None", target: "ModuleType | None"
) -> "ModuleSpec | None":
    for finder in list(sys.meta_path):
        find_spec = getattr(finder, "find_spec", None)
        if finder is watcher or find_spec is None:
            continue
        spec: ModuleSpec | None = find_spec(name, path, target)
        if spec is not None:
            return spec
    return None


def _report_on_use(failure: Exception) -> None:
    """Make `mergekit.merge_methods.get` raise for our names; any other name is undisturbed."""
    registry: Any = sys.modules.get("mergekit.merge_methods")
    original: Callable[..., Any] | None = getattr(registry, "get", None)
    if original is None:
        return  # a mergekit without this door cannot be asked for our methods through it either

    def get(name: str, *args: "Any", **kwargs: "Any") -> "Any":
        """Return a merge method by name; see mergekit."""
        if name in METHODS:
            _raise_failure(name, failure)
        return original(name, *args, **kwargs)

    registry.get = get


def _raise_failure(method: str, failure: Exception) -> "NoReturn":
    kind: type[Exception] = RuntimeError
    try:
        from fisher_mergekit.errors import FisherMergekitError

        kind = FisherMergekitError
    except Exception:  # our own package is damaged: say so with what Python has
        pass
    if kind is not RuntimeError and isinstance(failure, kind):
        raise failure.with_traceback(None)
    raise kind(
        f"Merge method {method!r} is not available: fisher_mergekit could not attach itself to "
        f"mergekit{_mergekit_version()} ({type(failure).__name__}: {failure}). Other methods are "
        "not affected. Install fisher_mergekit again as it was installed, and mergekit with: "
        'pip install --force-reinstall --no-deps "mergekit>=0.1.5,<0.2" '
        f"(or set {OFF_SWITCH}=1 to switch fisher_mergekit off)."
    ) from failure


def _mergekit_version() -> str:
    from importlib import metadata

    try:
        return " " + metadata.version("mergekit")
    except metadata.PackageNotFoundError:
        return " (of unknown version)"
