"""Running `mergekit-fisher precompute` in this process, and reading what it wrote."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from click.testing import CliRunner, Result

from fisher_mergekit.cli import main
from fisher_mergekit.sidecar.reader import Sidecar


def run(*arguments: object) -> Result:
    """Run `mergekit-fisher precompute` in this process."""
    return CliRunner().invoke(main, ["precompute", *map(str, arguments)])


def succeed(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def refuse(*arguments: object) -> str:
    """Run it, expect one message without a traceback; return it on one line."""
    result = run(*arguments)
    assert result.exit_code != 0
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Error: " in result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def flags(model: Path, data: Path, *more: object) -> list[object]:
    return ["--model", model, "--path", data, "--text", "text", *more]


def write_recipe(folder: Path, *models: Path, calibration: dict | None, **top: object) -> Path:
    path = folder / "recipe.yml"
    content = {
        "merge_method": "fisher",
        "models": [{"model": str(model)} for model in models],
        "calibration": calibration,
        "dtype": "float32",
        **top,
    }
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
    return path


def fisher_of(model: Path, out: Path | None = None) -> dict[str, torch.Tensor]:
    sidecar = Sidecar(out or model / "sidecar", "fisher")
    return {name: sidecar.load(name).clone() for name in sidecar}  # off the file: tests damage it


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return every file's content and time."""
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.iterdir())}
