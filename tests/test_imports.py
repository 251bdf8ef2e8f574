"""Imports go downward only, what every Python start touches is light, and the maps are whole."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fisher_mergekit

ROOT = Path(fisher_mergekit.__file__).parent
PACKAGE = "fisher_mergekit"

BELOW = {
    "__init__": set(),
    "startup": {"errors", "merging"},
    "errors": set(),
    "methods": set(),
    "shell": set(),
    "precision": set(),
    "recipe": {"errors", "methods"},
    "sidecar": {"errors", "methods"},
    "measure": {"errors", "recipe", "precision", "sidecar"},
    "merging": {"errors", "methods", "shell", "recipe", "precision", "sidecar"},
    "study": {"errors", "precision", "sidecar"},
    "cli": {"errors", "methods", "shell", "recipe", "sidecar", "measure", "study"},
}
"""What each sub-package, and each module beside them, imports of the others."""


def owner(path):
    """Return what a file belongs to: a sub-package, or the module that it is."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path):
    """Yield what a file imports of ours anywhere, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            # `from fisher_mergekit import errors` names it behind the import.
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for module in modules:
            parts = module.split(".")
            if parts[0] == PACKAGE:
                found = parts[1] if len(parts) > 1 else "__init__"
                yield "__init__" if found.startswith("__") else found


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("name", BELOW)
def test_each_imports_what_is_said_here(name):
    """And nothing else; anybody may ask for the version."""
    found = {one for path in FILES if owner(path) == name for one in imported(path)}
    assert found - {name, "__init__"} == BELOW[name]


def test_everything_is_said_here():
    assert {owner(path) for path in FILES} == set(BELOW)


@pytest.mark.parametrize("name", ["measure", "merging", "precision", "recipe", "sidecar", "study"])
def test_a_sub_package_s_map_names_all_that_is_in_it(name):
    """By its file's name, or as `kind` in a table."""
    text = ast.get_docstring(ast.parse((ROOT / name / "__init__.py").read_text(encoding="utf-8")))
    said = set(re.findall(r"(?<![\w.])\w+(?:\.py|/(?=\s))", text)) - {f"{name}/"}
    there = {
        f"{path.name}/" if path.is_dir() else path.name
        for path in (ROOT / name).iterdir()
        if not path.name.startswith("__")
    }
    assert said <= there, sorted(said - there)
    missing = there - said - {f"{word}.py" for word in re.findall(r"`(\w+)`", text)}
    assert not missing, sorted(missing)


def test_imports_have_no_cycle():
    """There is an order in which each imports earlier ones only."""
    left = {name: set(below) for name, below in BELOW.items()}
    while left:
        free = {name for name, below in left.items() if not below & left.keys()}
        assert free, f"a cycle among {sorted(left)}"
        left = {name: below for name, below in left.items() if name not in free}


@pytest.mark.parametrize("name", ["__init__.py", "startup.py"])
def test_what_every_start_touches_imports_the_standard_library_only(name):
    for node in ast.parse((ROOT / name).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = (
                [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            )
            assert all(m.split(".")[0] in sys.stdlib_module_names for m in modules)


def test_the_package_itself_is_light():
    code = (
        "import sys, fisher_mergekit, fisher_mergekit.startup\n"
        "heavy = {'torch', 'mergekit', 'transformers', 'pydantic', 'click'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_measuring_needs_no_planner():
    code = (
        "import sys, fisher_mergekit.measure, fisher_mergekit.sidecar\n"
        "assert 'mergekit.plan' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
