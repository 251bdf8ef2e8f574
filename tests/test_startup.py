"""The start-up hook, in real Python processes that start with a small sandbox as site-packages.

The sandbox holds our real start-up files and hook, a toy mergekit with the two modules that the
hook waits for, and a toy `merging.install` that writes down when it is called.
"""

import os
import pkgutil
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from textwrap import dedent

import click
import pytest

import fisher_mergekit
from fisher_mergekit import startup

PACKAGE = Path(fisher_mergekit.__file__).parent

TOY_MERGE_METHODS = """
    METHODS = {"linear": "the linear method"}
    def get(name):
        try:
            return METHODS[name]
        except KeyError:
            raise RuntimeError(f"Unimplemented merge method {name}") from None
    COMPLETE = True
"""
TOY_PLAN = """
    from mergekit import merge_methods
    COMPLETE = True
"""
TOY_INSTALL = """
    import sys
    calls = []
    def complete(name):
        return hasattr(sys.modules.get(name), "COMPLETE")
    def register():
        assert complete("mergekit.merge_methods")
        calls.append(f"register, plan complete: {complete('mergekit.plan')}")
        sys.modules["mergekit.merge_methods"].METHODS["fisher"] = "our method"
    def patch():
        assert complete("mergekit.plan")
        calls.append("patch")
"""
REPORT = "from fisher_mergekit.merging import install; print(*install.calls, sep='; ')"


class Sandbox:
    """A folder that a fresh Python treats as its site-packages."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        for name in ("fisher_mergekit.pth", "fisher_mergekit.start"):
            shutil.copy(PACKAGE / "startup_files" / name, folder)
        for name in ("__init__.py", "startup.py", "errors.py"):
            self.write(f"fisher_mergekit/{name}", (PACKAGE / name).read_text(encoding="utf-8"))
        self.write("fisher_mergekit/merging/__init__.py", "")
        self.write("fisher_mergekit/merging/install.py", TOY_INSTALL)
        self.write("mergekit/__init__.py", "")
        self.write("mergekit/merge_methods/__init__.py", TOY_MERGE_METHODS)
        self.write("mergekit/plan.py", TOY_PLAN)
        (folder / "click").symlink_to(Path(click.__file__).parent)

    def write(self, path: str, text: str) -> None:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(dedent(text), encoding="utf-8")

    def python(self, code: str, **environment: str) -> str:
        """Run code after a start with this folder as site-packages; return all that it prints."""
        # -S and addsitedir instead of a plain start: the environment that runs the tests has its
        # own copy of our start-up files.
        before = (
            f"import site, sys; start = set(sys.modules); site.addsitedir({str(self.folder)!r})"
        )
        clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", startup.OFF_SWITCH)}
        done = subprocess.run(
            [sys.executable, "-S", "-c", f"{before}\n{dedent(code)}"],
            env={**clean, "PYTHONDONTWRITEBYTECODE": "1", **environment},
            stdin=subprocess.DEVNULL,
            cwd=self.folder.parent,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return (done.stdout + done.stderr).strip()


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path / "site")


def refusal(name: str = "fisher") -> str:
    """Return code that prints the type and message of what `get(name)` raises."""
    return f"""
        from mergekit import merge_methods
        try:
            print(merge_methods.get({name!r}))
        except Exception as error:
            print(type(error).__name__, "|", error)
    """


# Python itself loads an encoding to read any .pth file.
ADDED = "*sorted(name for name in set(sys.modules) - start if not name.startswith('encodings.'))"


def test_a_start_loads_nothing_of_ours_and_adds_one_finder(sandbox: Sandbox) -> None:
    (sandbox.folder / "fisher_mergekit.start").unlink()
    assert (
        sandbox.python(f"print({ADDED}, sys.meta_path[0])")
        == "<class 'fisher_mergekit.Placeholder'>"
    )


def test_a_start_by_a_start_file_loads_two_modules(sandbox: Sandbox) -> None:
    (sandbox.folder / "fisher_mergekit.pth").unlink()
    entry = (sandbox.folder / "fisher_mergekit.start").read_text().strip()
    module, function = entry.split(":")
    said = sandbox.python(f"from {module} import {function} as f; f(); print({ADDED})")
    assert said == "fisher_mergekit fisher_mergekit.startup"


def test_both_files_lead_to_the_same_function() -> None:
    lines = (PACKAGE / "startup_files/fisher_mergekit.start").read_text().splitlines()
    assert [pkgutil.resolve_name(line) for line in lines] == [startup.start]
    lines = (PACKAGE / "startup_files/fisher_mergekit.pth").read_text().splitlines()
    (code,) = (line for line in lines if not line.startswith("#"))
    assert code.startswith("import ")
    assert f"from {startup.__name__} import {startup.start.__name__}" in code


def test_each_action_runs_once_its_own_module_is_complete(sandbox: Sandbox) -> None:
    said = sandbox.python("import mergekit.plan\n" + REPORT)
    assert said == "register, plan complete: False; patch"


def test_merge_methods_alone_are_enough_to_know_the_method(sandbox: Sandbox) -> None:
    assert sandbox.python(refusal()) == "our method"


def test_mergekits_modules_stay_ordinary_and_the_finder_leaves(sandbox: Sandbox) -> None:
    said = sandbox.python("""
        import inspect, mergekit.plan
        for module in mergekit.merge_methods, mergekit.plan:
            loader = module.__loader__
            assert loader is module.__spec__.loader
            assert type(loader).__name__ == "SourceFileLoader", loader
            assert "exec_module" not in vars(loader)
            assert "COMPLETE = True" in inspect.getsource(module)
        print(*(f"{finder} {type(finder)}" for finder in sys.meta_path))
    """)
    assert "PathFinder" in said
    assert "fisher_mergekit" not in said


@pytest.mark.parametrize("module", ["mergekit.merge_methods", "mergekit.plan"])
def test_a_late_start_acts_at_once(sandbox: Sandbox, module: str) -> None:
    (sandbox.folder / "fisher_mergekit.pth").unlink()
    (sandbox.folder / "fisher_mergekit.start").unlink()
    said = sandbox.python(f"""
        import {module}
        from fisher_mergekit.startup import start
        start()
        from mergekit import merge_methods
        print(merge_methods.get("fisher"), end="; ")
        import mergekit.plan
        {REPORT}
    """)
    late = module == "mergekit.plan"
    assert said == f"our method; register, plan complete: {late}; patch"


def test_both_start_up_files_in_one_start_do_no_more_than_one(sandbox: Sandbox) -> None:
    said = sandbox.python(f"""
        import pkgutil
        pkgutil.resolve_name({startup.__name__!r} + ":start")()
        print(sum(type(finder).__name__ == "Watcher" for finder in sys.meta_path), end="; ")
        import mergekit.plan
        {REPORT}
    """)
    assert said == "1; register, plan complete: False; patch"


def test_a_registration_that_imports_the_planner_is_finished_before_the_patch(
    sandbox: Sandbox,
) -> None:
    with (sandbox.folder / "fisher_mergekit/merging/install.py").open("a") as file:
        file.write(
            "inner = register\n"
            "def register():\n"
            "    import mergekit.plan\n"
            "    inner()\n"
            "    calls.append('registered')\n"
        )
    said = sandbox.python("import mergekit.merge_methods\n" + REPORT)
    assert said == "register, plan complete: True; registered; patch"


@pytest.mark.parametrize("place", ["0", "len(sys.meta_path)"])
def test_another_finder_that_asks_all_others_is_no_endless_loop(
    sandbox: Sandbox, place: str
) -> None:
    said = sandbox.python(f"""
        class Asking:
            def find_spec(self, name, path=None, target=None):
                for finder in sys.meta_path:
                    spec = None if finder is self else finder.find_spec(name, path, target)
                    if spec is not None:
                        return spec
        sys.meta_path.insert({place}, Asking())
        import mergekit.plan
        {REPORT}
    """)
    assert said == "register, plan complete: False; patch"


def test_a_look_without_an_import_leaves_the_hook_waiting(sandbox: Sandbox) -> None:
    said = sandbox.python("""
        import importlib.util
        assert importlib.util.find_spec("mergekit.merge_methods")
        assert "fisher_mergekit.merging.install" not in sys.modules
        import mergekit.plan
    """)
    assert said == ""
    assert sandbox.python("import mergekit.plan\n" + REPORT).endswith("patch")


def test_an_import_of_mergekit_that_fails_is_waited_for_again(sandbox: Sandbox) -> None:
    sandbox.write("mergekit/plan.py", "import sys\nsys.broken\n" + dedent(TOY_PLAN))
    said = sandbox.python(f"""
        try:
            import mergekit.plan
        except AttributeError as error:
            print(error, end="; ")
        sys.broken = False
        import mergekit.plan
        {REPORT}
    """)
    assert said.startswith("module 'sys' has no attribute 'broken'")
    assert said.endswith("; register, plan complete: False; patch")


def test_a_mergekit_inside_a_zip_file_whose_modules_share_one_loader(sandbox: Sandbox) -> None:
    archive = sandbox.folder / "mergekit.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted((sandbox.folder / "mergekit").rglob("*.py")):
            file.write(path, path.relative_to(sandbox.folder))
    shutil.rmtree(sandbox.folder / "mergekit")
    said = sandbox.python(f"sys.path.insert(0, {str(archive)!r})\nimport mergekit.plan\n" + REPORT)
    assert said == "register, plan complete: False; patch"


def test_the_off_switch_leaves_mergekit_alone(sandbox: Sandbox) -> None:
    off = {startup.OFF_SWITCH: "1"}
    assert sandbox.python(refusal(), **off) == "RuntimeError | Unimplemented merge method fisher"
    said = sandbox.python(f"import mergekit.plan\nprint({ADDED})", **off)
    assert "merging" not in said
    assert sandbox.python(refusal(), **{startup.OFF_SWITCH: "0"}) == "our method"


BROKEN_INSTALL = {
    "a registration that raises": ("raise_in_register", "KeyError: 'gone'"),
    "a patch that raises": ("raise_in_patch", "KeyError: 'gone'"),
    "a syntax error": ("syntax_error", "SyntaxError: "),
    "a missing module": ("missing", "ImportError: cannot import name 'install'"),
}


@pytest.mark.parametrize(("how", "what"), BROKEN_INSTALL.values(), ids=BROKEN_INSTALL.keys())
def test_a_failure_of_ours_is_told_at_the_use_of_our_methods_only(
    sandbox: Sandbox, how: str, what: str
) -> None:
    install = sandbox.folder / "fisher_mergekit/merging/install.py"
    if how == "missing":
        install.unlink()
    else:
        text = install.read_text()
        raising = "    raise KeyError('gone')\n"
        install.write_text(
            {
                "raise_in_register": text.replace(
                    "def register():\n", "def register():\n" + raising
                ),
                "raise_in_patch": text.replace("def patch():\n", "def patch():\n" + raising),
                "syntax_error": "def register(:\n",
            }[how]
        )
    said = sandbox.python("import mergekit.plan\nprint('imported')\n" + dedent(refusal()))
    kind, message = said.removeprefix("imported\n").split(" | ")
    assert kind == "FisherMergekitError"
    assert what in message
    assert "'fisher'" in message
    assert "pip install --force-reinstall" in message
    assert sandbox.python("import mergekit.plan\n" + dedent(refusal("linear"))) == (
        "the linear method"
    )
    assert sandbox.python("import mergekit.plan\n" + dedent(refusal("fishy"))) == (
        "RuntimeError | Unimplemented merge method fishy"
    )


def test_nothing_is_patched_after_a_failed_registration(sandbox: Sandbox) -> None:
    (sandbox.folder / "fisher_mergekit.pth").unlink()
    (sandbox.folder / "fisher_mergekit.start").unlink()
    install = sandbox.folder / "fisher_mergekit/merging/install.py"
    install.write_text("def register():\n    raise OSError\ndef patch():\n    print('patched')\n")
    said = sandbox.python("""
        import mergekit.plan
        from fisher_mergekit.startup import start
        start()
        print("started")
    """)
    assert said == "started"


def test_an_error_that_is_already_ours_is_told_in_its_own_words_each_time(
    sandbox: Sandbox,
) -> None:
    sandbox.write(
        "fisher_mergekit/merging/install.py",
        """
        from fisher_mergekit.errors import UnsupportedMergekit
        def register():
            raise UnsupportedMergekit("mergekit 9 is not supported")
        """,
    )
    said = sandbox.python(dedent(refusal()) * 2).splitlines()
    assert said == ["UnsupportedMergekit | mergekit 9 is not supported"] * 2


def test_a_failure_is_told_even_where_our_own_errors_cannot_be_imported(sandbox: Sandbox) -> None:
    shutil.rmtree(sandbox.folder / "fisher_mergekit/merging")
    (sandbox.folder / "fisher_mergekit/errors.py").unlink()
    said = sandbox.python(refusal())
    assert said.startswith("RuntimeError | Merge method 'fisher' is not available")


DAMAGE = {
    "the package is gone": ("fisher_mergekit", None),
    "an empty folder is left": ("fisher_mergekit", ""),
    "the hook is gone": ("fisher_mergekit/startup.py", None),
    "the package cannot be compiled": ("fisher_mergekit/__init__.py", "def (:"),
    "the hook raises": ("fisher_mergekit/startup.py", "raise OSError('no such thing')"),
    "the hook has no start": ("fisher_mergekit/startup.py", "begin = None"),
}


@pytest.mark.parametrize(("path", "text"), DAMAGE.values(), ids=DAMAGE.keys())
def test_python_starts_silently_with_a_damaged_package(
    sandbox: Sandbox, path: str, text: str | None
) -> None:
    # With a .start file it is Python 3.15 itself that imports the package and reports a failure.
    (sandbox.folder / "fisher_mergekit.start").unlink()
    target = sandbox.folder / path
    if target.is_dir():
        shutil.rmtree(target)
        if text is not None:
            target.mkdir()
    elif text is None:
        target.unlink()
    else:
        target.write_text(text)
    said = sandbox.python("from mergekit import merge_methods; print(merge_methods.get('linear'))")
    assert said == "the linear method"


def test_public_names_are_loaded_on_use() -> None:
    from fisher_mergekit.errors import FisherMergekitError

    assert fisher_mergekit.FisherMergekitError is FisherMergekitError
    assert "FisherMergekitError" in dir(fisher_mergekit)
    with pytest.raises(AttributeError, match="has no attribute 'FischerMergekitError'"):
        _ = fisher_mergekit.FischerMergekitError
