"""`mergekit-fisher inspect`: what it shows is what is in the files."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from hub import Hub
from huggingface_hub import constants
from models import make_measured, write_fishers
from sidecars import write_factors

from fisher_mergekit.cli import main
from fisher_mergekit.sidecar.header import FactorNames


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


def test_a_model_of_the_hub_is_named_by_its_name(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FISHER_MERGEKIT_HOME", str(tmp_path))
    shutil.copytree(model / "sidecar", tmp_path / "me--bert")
    assert inspect("me/bert").output == inspect(model).output


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Return a Hub that has the model; what is measured goes to `own`, downloads beside it."""
    monkeypatch.setenv("FISHER_MERGEKIT_HOME", str(tmp_path / "own"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    hub = Hub()
    hub.publish("me/bert", model)
    return hub


def test_what_was_published_with_a_model_is_shown_once_it_is_downloaded(
    model: Path, tmp_path: Path, hub: Hub
) -> None:
    assert "no sidecar of a model of this name" in inspect("me/bert").output
    hub.cached("me/bert", tmp_path)
    assert inspect("me/bert").output == inspect(model).output


def test_a_model_with_an_adapter_and_an_adapter_with_several_models(
    model: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(model / "sidecar", adapter / "sidecar-bert")
    shown = inspect(model).output
    assert inspect(f"{model}+{adapter}").output == shown
    assert inspect(adapter).output == shown
    shutil.copytree(model / "sidecar", adapter / "sidecar")
    said = inspect(adapter)
    assert said.exit_code == 1
    assert f"{adapter} holds 2 sidecars: name one of {adapter / 'sidecar'}," in said.output
    assert inspect(f"{model}+{adapter}").output == shown


def test_of_several_places_the_one_that_merging_reads_is_shown(
    model: Path, tmp_path: Path, hub: Hub
) -> None:
    """Here is something of that model, but not of this kind."""
    hub.cached("me/bert", tmp_path)
    (tmp_path / "own" / "me--bert").mkdir(parents=True)
    assert inspect("me/bert").output == inspect(model).output
    (tmp_path / "own" / "me--bert" / "gram.safetensors").write_bytes(b"")
    assert inspect("me/bert", "--kind", "fisher").output == inspect(model).output


def test_a_copy_of_a_sidecar_is_none(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model / "sidecar", tmp_path / "sidecar")
    shutil.copytree(model / "sidecar", tmp_path / "sidecar.bak")
    assert inspect(tmp_path).output == inspect(model).output


def test_brackets_in_a_model_s_name_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are no markup."""
    monkeypatch.setenv("COLUMNS", "500")
    folder = make_measured(tmp_path / "a[bold]b[" / "x]", seed=5)[0]
    shown = inspect(folder)
    assert shown.exit_code == 0, shown.exception
    assert f"{folder} (made-up)" in shown.output


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    said = inspect(tmp_path / "gone")
    assert said.exit_code == 1
    assert f"there is no file or folder {tmp_path / 'gone'}," in said.output
    assert "mergekit-fisher precompute" in said.output


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


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """A sidecar of all three kinds: two weights share their inputs, and the table's are counts."""
    generator = torch.Generator().manual_seed(0)
    query, key = (f"bert.encoder.layer.0.attention.self.{x}.weight" for x in ("query", "key"))
    table = "bert.embeddings.word_embeddings.weight"
    shapes = {query: (4, 6), key: (4, 6), table: (9, 6)}
    rows = torch.randn(20, 6, generator=generator)
    grads = torch.randn(20, 4, generator=generator)
    tensors = {f"{query}.inputs": rows.mT @ rows, f"{table}.inputs": torch.arange(9.0)}
    factors = {
        query: FactorNames(inputs=f"{query}.inputs"),
        key: FactorNames(inputs=f"{query}.inputs"),
        table: FactorNames(inputs=f"{table}.inputs", input_axis=-2),
    }
    place = tmp_path / "sidecar"
    nobody = dict.fromkeys(("estimator", "unit", "likelihood"), "none")
    write_factors(place, tensors, factors, shapes, kind="gram", **nobody)
    tensors[f"{query}.outputs"] = grads.mT @ grads
    factors[query] = FactorNames(inputs=f"{query}.inputs", outputs=f"{query}.outputs")
    write_factors(place, tensors, factors, shapes, kind="kfac")
    return place


def _cells(output: str, start: str) -> list[list[str]]:
    return [line.split() for line in output.splitlines() if line.startswith(start)]


def test_every_kind_is_shown_one_after_the_other(family: Path) -> None:
    shown = inspect(family)
    assert shown.exit_code == 0, shown.output
    assert [cells[1] for cells in _cells(shown.output, "kind ")] == ["gram", "kfac"]
    assert "nan" not in shown.output
    gram = inspect(family, "--kind", "gram").output
    assert not any(name in gram for name in ("estimator", "unit", "likelihood"))
    only = inspect(family, "--kind", "kfac")
    assert [cells[1] for cells in _cells(only.output, "kind ")] == ["kfac"]
    assert "1 factors of 4 outputs, for 1 weights." in only.output


def test_factors_are_shown_by_layer(family: Path) -> None:
    shown = inspect(family, "--kind", "gram").output
    assert "2 factors of 3 weights, 1 of them shared" in " ".join(shown.split())
    assert "2 factors of 6 to 9 inputs, 1 of them a diagonal, for 3 weights; 1 shared." in shown
    rank = _cells(shown.split("rank of inputs")[1], "layer 0")
    factor = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)).double()
    gram = factor.mT @ factor
    expected = gram.trace() ** 2 / gram.square().sum() / 6
    outside = 1 - gram.diagonal().square().sum() / gram.square().sum()
    assert rank == [["layer", "0", f"{expected:.1%}", f"{expected:.1%}", f"{outside:.1%}"]]


def test_every_factor_is_a_line(family: Path) -> None:
    shown = inspect(family, "--kind", "kfac", "--tensors").output
    lines = {cells[0]: cells[1:] for cells in _cells(shown, "bert.")}
    query = "bert.encoder.layer.0.attention.self.query.weight"
    assert lines[f"{query}.inputs"][:3] == ["6", "1", "2"]
    assert lines[f"{query}.outputs"][:3] == ["4", "1", "1"]
    counts = lines["bert.embeddings.word_embeddings.weight.inputs"]
    assert counts == ["9", "1", "1", "4.00e+00", f"{36**2 / 204:.1f}", "diagonal"]


def test_the_picture_of_one_kind(family: Path, tmp_path: Path) -> None:
    picture = tmp_path / "mass.png"
    said = inspect(family, "--plot", picture)
    assert said.exit_code == 1
    assert "holds gram, kfac: choose one to draw with --kind." in said.output
    assert inspect(family, "--plot", picture, "--kind", "gram").exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_kind_that_is_not_there(family: Path) -> None:
    said = inspect(family, "--kind", "fisher")
    assert said.exit_code == 1
    assert "has no complete 'fisher'; it has gram, kfac." in said.output


@pytest.mark.parametrize("flags", [(), ("--tensors",)])
def test_factors_of_zeros_are_shown_as_zeros(tmp_path: Path, flags: tuple) -> None:
    weight = "model.layers.0.mlp.experts.up_proj"
    place = write_factors(
        tmp_path / "sidecar",
        {"x": torch.zeros(2, 6, 6)},
        {weight: FactorNames(inputs="x")},
        {weight: (2, 5, 6)},
        kind="gram",
    )
    shown = inspect(place, *flags)
    assert shown.exit_code == 0, shown.output
    assert "nan" not in shown.output


def test_the_page_names_the_kinds(family: Path) -> None:
    page = (family / "README.md").read_text()
    assert "## `gram`: Gram matrices of the linear layers' inputs" in page
    assert "## `kfac`: Kronecker-factored Fisher information of the linear layers" in page
    assert "| tensors | 2 factors of 3 weights, 1 of them shared |" in page
