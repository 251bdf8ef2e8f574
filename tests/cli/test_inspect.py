"""`mergekit-fisher inspect`: what it shows is what is in the files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from models import make_measured, write_fishers

from fisher_mergekit.cli import main


def inspect(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["inspect", *map(str, arguments)])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_measured(tmp_path_factory.mktemp("models") / "bert", seed=5)[0]


def test_the_header_and_every_layer_are_shown(model: Path) -> None:
    shown = inspect(model / "sidecar")
    assert shown.exit_code == 0, shown.output
    for part in ("fisher", "made-up", "exact", "sequence", "layer 0", "layer 1", "embedding"):
        assert part in shown.output
    assert "100.0%" in shown.output


def test_a_model_s_folder_a_sidecar_and_its_one_file_show_the_same(model: Path) -> None:
    shown = [inspect(p).output for p in (model, model / "sidecar", _file(model))]
    assert shown[0] == shown[1] == shown[2]


def _file(model: Path) -> Path:
    return model / "sidecar" / "fisher.safetensors"


def test_the_shares_of_the_tensors_add_up(model: Path) -> None:
    lines = inspect(model, "--tensors").output.splitlines()
    shares = [float(m.group(1)) for line in lines if (m := re.search(r"([\d.]+)%$", line))]
    assert len(shares) > 30
    assert sum(shares) == pytest.approx(100, abs=0.5)


def test_the_mean_of_a_tensor_is_the_mean(tmp_path: Path) -> None:
    folder, _, fishers = make_measured(tmp_path / "m", seed=2)
    line = next(
        line
        for line in inspect(folder, "--tensors").output.splitlines()
        if line.startswith("bert.pooler.dense.weight ")
    )
    assert float(line.split()[2]) == pytest.approx(
        float(fishers["bert.pooler.dense.weight"].mean()), rel=1e-2
    )


def test_the_picture_is_written(model: Path, tmp_path: Path) -> None:
    picture = tmp_path / "mass.png"
    assert inspect(model, "--plot", picture).exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["mass.nonsense", "missing/mass.png"])
def test_a_picture_that_cannot_be_written_is_one_sentence(
    model: Path, tmp_path: Path, name: str
) -> None:
    said = inspect(model, "--plot", tmp_path / name)
    assert said.exit_code == 1
    assert said.output.splitlines()[-1].startswith("Error: cannot write")


def test_no_sidecar_says_how_to_make_one(tmp_path: Path) -> None:
    said = inspect(tmp_path)
    assert said.exit_code == 1
    assert "there is no sidecar" in said.output
    assert "mergekit-fisher precompute" in said.output


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    folder = make_measured(tmp_path / "m")[0]
    content = bytearray(_file(folder).read_bytes())
    content[-1] ^= 1
    _file(folder).write_bytes(content)
    said = inspect(folder)
    assert said.exit_code == 1
    assert "checksum differs" in said.output


def test_a_fisher_of_zeros_has_no_shares_and_no_traceback(tmp_path: Path) -> None:
    folder, _, fishers = make_measured(tmp_path / "m")
    write_fishers(folder, {name: values * 0 for name, values in fishers.items()})
    shown = inspect(folder, "--plot", tmp_path / "zero.png")
    assert shown.exit_code == 0, shown.output
