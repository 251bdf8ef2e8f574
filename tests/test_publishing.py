"""A sidecar's page is ready for the Hub, and the commands of docs/publishing.md do what it says."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

import merge_oracle
import pytest
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.cli import hf
from models import make_measured, make_model, random_fishers, read, write_fishers
from running import assert_close, merged

from fisher_mergekit.sidecar.header import (
    Header,
    Measurement,
    ModelIdentity,
    Settings,
    WeightRecord,
)
from fisher_mergekit.sidecar.location import folder_name, writing_place
from fisher_mergekit.sidecar.page import PAGE_NAME, render_page

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [DOCS / "publishing.md", DOCS / "quickstart.md"]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def hub_commands(page: Path) -> list[list[str]]:
    """Return the commands to the Hub that a page tells to type, split as a shell does."""
    lines = "\n".join(blocks(page.read_text(encoding="utf-8"), "sh")).splitlines()
    return [shlex.split(x, comments=True) for x in lines if x.startswith("hf ")]


class Hub:
    """Repositories that are folders below the current one: `ORG/rte` is then found like a download.

    What `hf` makes of its arguments arrives here; nothing reaches for a network.
    """

    def __init__(self, patch: pytest.MonkeyPatch):
        self.created: list[str] = []
        patch.setattr(HfApi, "create_repo", lambda _, **arguments: self.create(**arguments))
        patch.setattr(HfApi, "upload_folder", lambda _, **arguments: self.upload(**arguments))
        patch.setattr("huggingface_hub.cli.download.snapshot_download", self.download)
        for check in ("check_cli_update", "check_skill_update"):
            patch.setattr(hf, check, lambda *_: None, raising=False)

    def run(self, arguments: list[str]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", arguments)
            code: object = None
            try:
                hf.main()
            except SystemExit as end:
                code = end.code
            assert not code, arguments

    def create(self, *, repo_id: str, repo_type: str, **_: object) -> object:
        assert repo_type == "model"
        self.created.append(repo_id)
        return type("Created", (), {"repo_id": repo_id})()

    def upload(self, *, repo_id: str, folder_path: str, path_in_repo: str, **more: object) -> str:
        assert not more["allow_patterns"]
        shutil.copytree(folder_path, Path(repo_id, path_in_repo), dirs_exist_ok=True)
        return f"https://huggingface.co/{repo_id}"

    def download(self, repo_id: str, *, local_dir: str, **more: object) -> str:
        assert not more["allow_patterns"]
        shutil.copytree(repo_id, local_dir, dirs_exist_ok=True)
        return local_dir


def test_the_documented_commands_publish_what_others_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hub = Hub(monkeypatch)
    rte, rte_weights, rte_fisher = make_measured(Path("rte"), seed=1)
    mnli = Path("ORG/mnli")
    Path("law-lora").mkdir()
    make_model(mnli, seed=2, num_labels=3)  # it is on the Hub without a sidecar
    mnli_weights, mnli_fisher = read(mnli), random_fishers(mnli, 2)
    write_fishers(mnli, mnli_fisher, out=Path("measured/mnli"))
    write_fishers(rte, rte_fisher, out=Path("measured/rte"))

    by_kind: dict[str, list[list[str]]] = {"upload": [], "download": []}
    for command in hub_commands(DOCS / "publishing.md"):
        by_kind[command[1]].append(command)
    own, whole, pair, foreign, result = by_kind["upload"]
    assert Path(pair[3]) == writing_place("law-lora", None, "ORG/base")
    assert pair[4] == folder_name("ORG/base")
    (fetch,) = by_kind["download"]

    hub.run(whole)
    assert read(Path("ORG/rte")).keys() == rte_weights.keys()
    shutil.rmtree("ORG/rte/sidecar")
    hub.run(own)
    assert sorted(p.name for p in Path("ORG/rte/sidecar").iterdir()) == [
        "README.md", "fisher.safetensors", "header.json",
    ]  # fmt: skip
    hub.run(foreign)
    assert ModelCard.load(Path("ORG/rte-sidecar", PAGE_NAME)).data.library_name == "fisher_mergekit"
    hub.run([part.replace("rte", "mnli") for part in foreign])
    hub.run(fetch)
    shutil.rmtree("rte")
    shutil.rmtree("measured")

    (recipe,) = blocks((DOCS / "publishing.md").read_text(encoding="utf-8"), "yaml")
    found = merged(yaml.safe_load(recipe), Path("merged"), write_model_card=True)
    body = [name for name in rte_weights if "classifier" not in name]
    expected = merge_oracle.merge(
        [rte_weights, mnli_weights], [rte_fisher, mnli_fisher], [0.7, 0.3], names=body
    )
    heads = {name: rte_weights[name] for name in rte_weights.keys() - set(body)}
    assert_close(found, {**expected, **heads})
    hub.run(result)
    assert "### Measured precisions" in Path("ORG/rte-mnli", PAGE_NAME).read_text()
    assert set(hub.created) == {"ORG/rte", "ORG/rte-sidecar", "ORG/mnli-sidecar", "ORG/rte-mnli"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_documented_command_is_refused(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hub = Hub(monkeypatch)
    for folder in (
        "law-lora/sidecar-ORG--base",
        "rte/sidecar",
        "measured/rte",
        "merged",
        "ORG/mnli-sidecar",
    ):
        Path(folder).mkdir(parents=True)
    commands = hub_commands(page)
    assert commands
    for command in commands:
        hub.run(command)


def header(reference: str, *kinds: str, revision: str | None = None, **settings: object) -> Header:
    base = {"estimator": "exact", "unit": "sequence", "likelihood": "categorical", "examples": 8,
            "tokens": 64, "max_length": 16}  # fmt: skip
    measurement = Measurement(
        settings=Settings.model_validate({**base, **settings}),
        calibration={"path": "glue", "name": "rte"},
        weights={},
        tensors={},
    )
    model = ModelIdentity(reference=reference, revision=revision, architecture="Toy")
    return Header(model=model, kinds=dict.fromkeys(kinds or ("fisher",), measurement))


def test_the_page_is_a_card_with_metadata() -> None:
    page = ModelCard(render_page(header("org/rte", revision="v1")))
    assert page.data.to_dict() == {
        "library_name": "fisher_mergekit",
        "tags": ["fisher-information", "mergekit", "merge"],
    }
    assert page.text.startswith("# What org/rte is sure of\n")
    assert "**[org/rte](https://huggingface.co/org/rte)** at revision `v1` (Toy)" in page.text


@pytest.mark.parametrize(
    ("reference", "title", "model"),
    [
        ("org/rte", "org/rte", "org/rte"),
        ("org/base@v2+org/adapter", "org/base@v2+org/adapter", "org/base@v2+org/adapter"),
        ("./rte", "rte", "MODEL"),
        ("/home/someone/secret/rte", "rte", "MODEL"),
        ("./base+./adapter", "base+adapter", "MODEL"),
        ("here/rte", "rte", "MODEL"),
    ],
)
def test_the_page_names_what_others_can_find(
    reference: str, title: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here/rte").mkdir(parents=True)
    page = render_page(header(reference))
    assert f"# What {title} is sure of\n" in page
    assert page.count("https://huggingface.co/") == (0 if model == "MODEL" else title.count("org/"))
    assert "secret" not in page
    (recipe,) = blocks(page, "yaml")
    assert yaml.safe_load(recipe)["models"][0]["model"] == model


def test_the_page_of_a_pair_names_the_folder_that_is_looked_for() -> None:
    page = render_page(header("org/base@v2+org/adapter"))
    assert "A folder called `sidecar-org--base@v2/` in the adapter's own folder" in page
    assert yaml.safe_load(blocks(page, "yaml")[0])["models"][0]["parameters"] == {
        "lambda": 0.5,
        "sidecar": "./sidecar-org--base@v2",
    }


def test_the_page_of_an_adapter_alone_promises_no_merge() -> None:
    own = header("org/adapter")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    weights = {name: WeightRecord(dtype="F32", shape=(2, 8), digest="")}
    measured = {k: m.model_copy(update={"weights": weights}) for k, m in own.kinds.items()}
    page = render_page(own.model_copy(update={"kinds": measured}))
    assert "measure and merge `model+adapter`" in page
    assert not blocks(page, "yaml")


@pytest.mark.parametrize(
    ("kinds", "method", "others"),
    [
        (("fisher",), "fisher", ""),
        (("gram",), "regmean", ""),
        (("kfac", "gram", "fisher"), "fisher", "# or regmean, mats"),
    ],
)
def test_the_page_names_the_methods(kinds: tuple[str, ...], method: str, others: str) -> None:
    (recipe,) = blocks(render_page(header("org/rte", *kinds)), "yaml")
    assert yaml.safe_load(recipe)["merge_method"] == method
    assert others in recipe
    assert ("# or" in recipe) == bool(others)


def test_the_pages_own_recipe_merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a reader would use it: the files beside the recipe, the two gaps filled."""
    monkeypatch.chdir(tmp_path)
    a, weights_a, fisher_a = make_measured(Path("a"), "llama", seed=1)
    _, weights_b, fisher_b = make_measured(Path("b"), "llama", seed=2)
    (a / "sidecar").rename("sidecar")
    (recipe,) = blocks(Path("sidecar", PAGE_NAME).read_text(), "yaml")
    filled = recipe.replace("MODEL", "./a").replace("ANOTHER", "./b")
    found = merged(yaml.safe_load(filled), Path("merged"))
    expected = merge_oracle.merge(
        [weights_a, weights_b], [fisher_a, fisher_b], [0.5, 0.5], names=list(weights_a)
    )
    assert_close(found, expected)
