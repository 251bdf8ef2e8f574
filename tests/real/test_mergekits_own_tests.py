"""mergekit's own tests, with our hook and without it: the same outcomes, the same bytes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from real.packages import MERGEKIT

from fisher_mergekit.methods import METHODS
from fisher_mergekit.startup import OFF_SWITCH

COMMON = Path(__file__).parent / "mergekits_own" / "common.py"
CONFTEST = "from fisher_mergekit import startup\n\nstartup.start()\n"
"""Where the start-up file is not installed; the off switch holds for it, too."""


@dataclass
class Outcomes:
    """What became of each test, and the digests of what was merged, in order."""

    tests: dict[str, str]
    digests: list[str]
    said: str


def run_tests(folder: Path, **environment: str) -> Outcomes:
    """Run mergekit's tests, which lie in a folder, in a process of their own."""
    report, digests = folder / "report.xml", folder / "digests.txt"
    for old in (report, digests):
        old.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}",
         f"--basetemp={folder / 'models'}", "tests"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=1800,
        env={
            **os.environ, "HF_HUB_OFFLINE": "1", OFF_SWITCH: "0",
            # mergekit's order of models is that of a set of their paths, and DARE draws in it.
            "PYTHONHASHSEED": "0",
            "FISHER_MERGEKIT_TEST_DIGESTS": str(digests), **environment,
        },
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert report.exists(), said
    tests = {}
    for case in ET.parse(report).iter("testcase"):
        outcome = next((c.tag for c in case if c.tag in ("failure", "error", "skipped")), "passed")
        tests[f"{case.get('classname')}::{case.get('name')}"] = outcome
    return Outcomes(tests, digests.read_text().splitlines(), said)


@pytest.mark.slow
@pytest.mark.real
def test_mergekits_own_tests_do_not_notice_us(tmp_path: Path) -> None:
    installed = metadata.version("mergekit")
    assert installed == MERGEKIT.version, (
        f"mergekit {installed} is installed. To try its own tests, enter its source package, "
        f"mergekit-{installed}.tar.gz, with its SHA-256 in tests/real/packages.py."
    )
    with tarfile.open(MERGEKIT.bring()) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "own"  # without the package's source, so that the installed one is tested
    shutil.copytree(tmp_path / f"mergekit-{installed}" / "tests", folder / "tests")
    if not (folder / "tests" / "common.py").exists():
        shutil.copy(COMMON, folder / "tests" / "common.py")
    (folder / "tests" / "__init__.py").touch()
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "pytest.ini").write_text("[pytest]\n")

    without = run_tests(folder, **{OFF_SWITCH: "1"})
    assert set(without.tests.values()) <= {"passed", "skipped"}, without.said
    assert list(without.tests.values()).count("passed") > 400, without.said
    with_us = run_tests(folder)

    differing = {
        test: f"{outcome} without us, {with_us.tests.get(test)} with us"
        for test, outcome in without.tests.items()
        if with_us.tests.get(test) != outcome
    }
    assert not differing, with_us.said
    assert len(without.digests) > 40
    assert with_us.digests == without.digests
    # Tests of every registered method found ours among them, so the hook was there.
    more = with_us.tests.keys() - without.tests.keys()
    assert {name for name in METHODS if any(f"[{name}]" in test for test in more)} == set(METHODS)
    assert all(any(name in test for name in METHODS) for test in more), more
