"""The house stands: imports go downward only, and what every Python start touches is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fisher_mergekit

ROOT = Path(fisher_mergekit.__file__).parent
PACKAGE = "fisher_mergekit"

BELOW = {
    "__init__": {"errors"},
    "startup": {"errors", "merging"},
    "errors": set(),
    "methods": set(),
    "shell": set(),
    "precision": {"errors"},
    "recipe": {"errors", "methods"},
    "sidecar": {"errors", "methods", "precision"},
    "measure": {"errors", "methods", "recipe", "precision", "sidecar"},
    "merging": {"errors", "methods", "shell", "recipe", "precision", "sidecar"},
    "study": {"errors", "methods", "recipe", "precision", "sidecar", "measure", "merging"},
    "cli": {
        "errors",
        "methods",
        "shell",
        "recipe",
        "precision",
        "sidecar",
        "measure",
        "merging",
        "study",
    },
}
"""What each room may import, besides itself."""


def room(path):
    """Return the room that a file belongs to: a sub-package, or a module of its own."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(path):
    """Yield the rooms that a file imports anywhere, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            # `from fisher_mergekit import errors` names its room behind the import.
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for module in modules:
            parts = module.split(".")
            if parts[0] == PACKAGE:
                found = parts[1] if len(parts) > 1 else "__init__"
                yield "__init__" if found.startswith("__") else found


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downward(path):
    here = room(path)
    allowed = {here, "__init__", *BELOW[here]}  # anybody may ask for the version
    wrong = set(imported_rooms(path)) - allowed
    assert not wrong, f"{here} may not import {sorted(wrong)}"


def test_every_room_is_there():
    assert {room(path) for path in FILES} == set(BELOW)


def test_measuring_and_merging_meet_only_at_the_sidecar():
    assert "merging" not in BELOW["measure"]
    assert "measure" not in BELOW["merging"]


def test_floors_have_no_cycle():
    """Rooms can be put in an order in which each imports earlier ones only."""
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


def test_the_measuring_floor_needs_no_planner():
    code = (
        "import sys, fisher_mergekit.measure, fisher_mergekit.sidecar\n"
        "assert 'mergekit.plan' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
