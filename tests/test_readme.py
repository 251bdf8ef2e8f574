"""What the README and the docs point to is there."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import yaml

from fisher_mergekit.methods import METHODS
from fisher_mergekit.precision import kind_for
from fisher_mergekit.recipe import parse_config, read_calibration

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "recipes" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", text)
    for link in filter(None, (part for pair in links for part in pair)):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        place = page.parent / name if name else page
        assert place.exists(), link
        assert not anchor or anchor in anchors(place), link


def anchors(page: Path) -> set[str]:
    """Return the names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_recipes_in_the_text_are_recipes(page: Path) -> None:
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        content = yaml.safe_load(block)
        if "models" in content:
            parse_config(content, where=page.name)
        for entry in (content, *content.get("models", ())):
            read_calibration(entry.get("calibration"), where=page.name)


def test_extras_that_the_readme_installs_exist() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = re.findall(r"\"\.\[(\w+)\]\"", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert set(extras) == {"demo", "test"}
    for extra in extras:
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE)


def test_what_is_written_twice_is_the_same() -> None:
    """The methods must not import torch to know a default."""
    compared = []
    for method in METHODS.values():
        known = inspect.signature(kind_for(method.kind).system).parameters
        for parameter in method.parameters:
            if parameter.name in known:
                assert parameter.default == known[parameter.name].default, parameter
                compared.append(parameter.name)
    assert compared == [
        *("normalize_fishers", "floor"),
        *("offdiagonal", "ridge"),
        *("normalize_fishers", "offdiagonal", "tolerance", "iterations"),
    ]
