"""Every architecture that mergekit knows is measured exactly and merged, and the docs say so."""

from __future__ import annotations

import pytest
import torch
import transformers
from architectures import table, zoo
from architectures.check import check, mergekit_can, runs
from models import read
from running import command

ENTRIES = list(zoo.entries())
ABSENT = [entry for entry in ENTRIES if entry.absent]
QUICK = ("BertForTokenClassification", "LlamaForCausalLM", "MixtralForCausalLM")
"""Of the kinds seen most; the others are tried with the slow tests."""


def parameters() -> list:
    return [
        pytest.param(entry, marks=() if entry.architecture in QUICK else pytest.mark.slow)
        for entry in ENTRIES
        if not entry.absent
    ]


@pytest.mark.parametrize("entry", parameters(), ids=str)
def test_it_is_measured_exactly_and_merged(entry, tmp_path):
    report = check(entry.architecture, tmp_path)
    if entry.architecture in zoo.BROKEN and not runs(entry.architecture):
        assert "alone, without anything of this package" in report.refusal
        pytest.skip(zoo.BROKEN[entry.architecture])
    if entry.architecture in zoo.BODIES:
        assert report.error is None
        assert f"{entry.architecture} names no head" in report.refusal
    elif entry.architecture in zoo.UNMERGED:
        assert report.error is not None
        assert zoo.UNMERGED[entry.architecture][1] in report.refusal
        assert not mergekit_can(entry.architecture, tmp_path)
    else:
        assert report.is_merged, report.refusal
    if report.factors is not None:
        assert all("position" in name or "relative" in name for name in report.factors.tables)
    assert without_digits(table.row(entry, report)) == without_digits(in_the_docs(entry))


def in_the_docs(entry: zoo.Entry) -> tuple[str, ...]:
    return table.written()[table.row(entry, None)[:2]]


def without_digits(cells: tuple[str, ...]) -> tuple[str, ...]:
    """Leave out how small the error was: another machine rounds elsewhere."""
    return tuple("measured" if cell.startswith("1e-") else cell for cell in cells)


@pytest.mark.parametrize("entry", ABSENT, ids=str)
def test_what_is_said_to_be_no_model_is_none(entry):
    known = transformers.CONFIG_MAPPING
    assert not hasattr(transformers, entry.architecture) or entry.model_type not in known
    assert in_the_docs(entry) == table.row(entry, None)


def test_the_docs_list_what_mergekit_lists_and_nothing_else():
    listed = [table.row(entry, None)[:2] for entry in ENTRIES]
    assert list(table.written()) == listed


def test_every_architecture_has_a_model_or_a_reason():
    for entry in ENTRIES:
        assert bool(entry.absent) != (
            entry.architecture in zoo.SIZES and (entry.file, entry.architecture) not in zoo.ABSENT
        ), entry
    names = {entry.architecture for entry in ENTRIES}
    assert zoo.SIZES.keys() | zoo.UNMERGED.keys() | zoo.REMARKS.keys() <= names


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "ViTForImageClassification"])
def test_the_command_in_a_process_of_its_own_gives_the_same_bytes(architecture, tmp_path):
    assert check(architecture, tmp_path).is_merged
    done = command("mergekit-yaml", tmp_path / "recipe.yml", tmp_path / "other", "--quiet")
    assert done.returncode == 0, done.stderr
    here, there = read(tmp_path / "merged"), read(tmp_path / "other")
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)
