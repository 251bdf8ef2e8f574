"""Models by their names on the Hub: what is downloaded, where sidecars are, and what holds offline.

The Hub is a small HTTP server (tests/hub.py); caches are huggingface_hub's own, or laid out by hand
as it lays them out. mergekit asks for the list of a repository's files also where they are cached,
so offline it cannot take a model by its name, whatever the method: the snapshot's folder is named.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import merge_oracle
import pytest
import tiny
import torch
import yaml
from adapters import make_adapter
from hub import Hub
from huggingface_hub import constants, hf_api
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from models import Tensors, random_fishers, read, write_fishers
from precomputing import fisher_of, refuse, succeed
from running import assert_close, command, merged, recipe_of
from safetensors.torch import load_file

from fisher_mergekit.errors import PlanningError

pytestmark = pytest.mark.slow  # exhaustive: not needed at every change

SETTINGS = {"estimator": "sampled", "likelihood": "causal_lm", "max_length": 512}
"""As `precompute` measures a language model."""


class Place:
    """A computer of its own: its caches, and whether it is online."""

    def __init__(self, home: Path, hub: Hub, url: str, monkeypatch: pytest.MonkeyPatch):
        self.home, self.hub, self.url, self._patch = home, hub, url, monkeypatch
        self.cache, self.own = home / "hub", home / "own"
        monkeypatch.setenv("FISHER_MERGEKIT_HOME", str(self.own))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(self.cache))
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(hf_api.api, "endpoint", url)
        monkeypatch.setattr(LoaderCache, "loaders", {})
        self.go(online=True)

    def go(self, *, online: bool) -> None:
        self._patch.setattr(constants, "HF_HUB_OFFLINE", not online)
        huggingface_hub.close_session()

    def snapshot(self, name: str, revision: str = "main", cache: Path | None = None) -> Path:
        sha = self.hub.repositories[name].resolve(revision)
        return (cache or self.cache) / f"models--{name.replace('/', '--')}" / "snapshots" / str(sha)


@pytest.fixture
def place(tmp_path, monkeypatch):
    hub = Hub()
    with hub.served() as url:
        yield Place(tmp_path / "home", hub, url, monkeypatch)
    huggingface_hub.close_session()


def model(folder: Path, seed: int, *, measured: bool = True) -> tuple[Path, Tensors, Tensors]:
    """Make a language model with a tokenizer, and a sidecar as if it had been measured."""
    tiny.save_model(folder, "llama", seed=seed)
    fishers = random_fishers(folder, seed)
    if measured:
        write_fishers(folder, fishers, **SETTINGS)
    return folder, read(folder), fishers


@pytest.fixture
def pair(place, tmp_path):
    """Publish two models; only the first comes with a sidecar."""
    a, b = model(tmp_path / "a", 1), model(tmp_path / "b", 2, measured=False)
    place.hub.publish("me/a", a[0], "v1")
    place.hub.publish("me/b", b[0])
    return a, b


def by_hand(*models: tuple[Path, Tensors, Tensors]) -> Tensors:
    _, thetas, fishers = zip(*models, strict=True)
    return merge_oracle.merge(thetas, fishers, [1] * len(models), list(thetas[0]))


def on_data(tmp_path: Path, *names: str, **top: object) -> Path:
    """Write a recipe whose models are measured on a file."""
    data = tiny.write_rows(tmp_path / "data.jsonl")
    recipe = recipe_of(*names, **top)  # type: ignore[arg-type]
    for entry in recipe["models"]:
        if entry["model"] != "me/a":  # taken as its author measured it
            entry["calibration"] = {"path": str(data), "text": "text"}
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe))
    return path


class TestFirstDownload:
    def test_brings_what_the_author_published(self, place, pair, tmp_path):
        """mergekit's patterns take the folder `sidecar/` along, page and all but that."""
        write_fishers(pair[1][0], pair[1][2], **SETTINGS)
        place.hub.publish("me/b", pair[1][0])
        found = merged(recipe_of("me/a", "me/b"), tmp_path / "out")
        assert_close(found, by_hand(*pair))
        file = place.snapshot("me/a") / "sidecar" / "fisher.safetensors"
        assert file.is_symlink()
        assert "me/a/sidecar/header.json" in place.hub.downloads
        assert not place.own.exists()

    def test_precompute_takes_it_and_measures_the_other_one(self, place, pair, tmp_path):
        """What was measured of a Hub model goes to the user's own cache."""
        recipe = on_data(tmp_path, "me/a", "me/b")
        said = succeed(recipe)
        assert f"me/a: {place.snapshot('me/a') / 'sidecar'} is valid" in said
        assert f"wrote {place.own / 'me--b'}" in said
        (_, theta_b, _) = pair[1]
        measured = fisher_of(place.own, place.own / "me--b")
        b = (pair[1][0], theta_b, measured)
        found = merged(yaml.safe_load(recipe.read_text()), tmp_path / "out")
        assert_close(found, by_hand(pair[0], b))
        assert "Measured 0 of 2 models" in succeed(recipe)

    def test_another_kind_of_one_s_own_hides_nothing(self, place, pair, tmp_path):
        """`mats` with `others: fisher` needs both kinds: the author's, and one measured here."""
        recipe = on_data(tmp_path, "me/a", "me/b", merge_method="mats")
        succeed(recipe, "--path", tmp_path / "data.jsonl", "--text", "text")
        succeed(on_data(tmp_path, "me/a", "me/b"))
        assert sorted(p.name for p in (place.own / "me--a").glob("*.safetensors")) == [
            "kfac.safetensors"
        ]
        b = (pair[1][0], pair[1][1], fisher_of(place.own, place.own / "me--b"))
        found = merged(recipe_of("me/a", "me/b"), tmp_path / "out")
        assert_close(found, by_hand(pair[0], b))
        both = recipe_of("me/a", "me/b", merge_method="mats", parameters={"others": "fisher"})
        assert merged(both, tmp_path / "both").keys() == found.keys()

    def test_a_tokenizer_that_is_a_list_of_words(self, place, tmp_path):
        """mergekit downloads no vocab.txt, but data cannot be read without it."""
        folder = tiny.save_model(tmp_path / "bert", num_labels=3)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()
        (folder / "vocab.txt").write_text("\n".join([*tiny.SPECIAL, *tiny.WORDS]) + "\n")
        place.hub.publish("me/old", folder)
        data = tiny.write_rows(tmp_path / "data.jsonl")
        succeed("--model", "me/old", "--path", data, "--text", "text")
        assert (place.own / "me--old" / "fisher.safetensors").is_file()

    def test_what_the_user_measured_comes_before_what_is_published(self, place, pair, tmp_path):
        mine = random_fishers(pair[0][0], 7)
        write_fishers(pair[0][0], mine, out=place.own / "me--a", **SETTINGS)
        write_fishers(pair[1][0], pair[1][2], out=place.own / "me--b", **SETTINGS)
        found = merged(recipe_of("me/a", "me/b"), tmp_path / "out")
        assert_close(found, by_hand((*pair[0][:2], mine), pair[1]))

    def test_the_cache_follows_xdg(self, place, pair, tmp_path, monkeypatch):
        monkeypatch.delenv("FISHER_MERGEKIT_HOME")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        own = tmp_path / "xdg" / "fisher_mergekit" / "me--b"
        write_fishers(pair[1][0], pair[1][2], out=own, **SETTINGS)
        assert_close(merged(recipe_of("me/a", "me/b"), tmp_path / "out"), by_hand(*pair))
        shutil.rmtree(own)
        with pytest.raises(PlanningError, match=f"me/b: there is no sidecar at {own}"):
            merged(recipe_of("me/a", "me/b"), tmp_path / "out2")

    def test_no_such_model(self, place, tmp_path):
        data = tiny.write_rows(tmp_path / "data.jsonl")
        said = refuse("--model", "me/none", "--path", data, "--text", "text")
        assert "me/none is neither a local folder nor a model that can be downloaded" in said


class TestRevisions:
    @pytest.fixture
    def history(self, place, tmp_path):
        """A model that was trained further, and measured each time."""
        first = model(tmp_path / "a", 1)
        place.hub.publish("me/a", first[0], "v1")
        second_folder = tmp_path / "second"
        second = model(second_folder, 5)
        place.hub.publish("me/a", second_folder, "v2")
        return first, second

    def test_each_has_its_own_sidecar(self, place, history, tmp_path):
        found = merged(recipe_of("me/a@v1", "me/a@v2"), tmp_path / "out")
        assert_close(found, by_hand(*history))
        assert place.snapshot("me/a", "v1") != place.snapshot("me/a", "v2")

    def test_a_commit_is_a_revision(self, place, history, tmp_path):
        sha = place.hub.repositories["me/a"].resolve("v1")
        found = merged(recipe_of(f"me/a@{sha}", "me/a"), tmp_path / "out")
        assert_close(found, by_hand(*history))

    def test_measured_under_its_revision(self, place, history, tmp_path):
        """And found there, but not taken for another revision's."""
        data = tiny.write_rows(tmp_path / "data.jsonl")
        flags = ("--path", data, "--text", "text", "--force")
        said = succeed("--model", "me/a@v1", *flags)
        assert f"wrote {place.own / 'me--a@v1'}" in said
        mine = fisher_of(place.own, place.own / "me--a@v1")
        first, second = history
        found = merged(recipe_of("me/a@v1", "me/a@v2"), tmp_path / "out")
        assert_close(found, by_hand((*first[:2], mine), second))

    def test_a_sidecar_of_another_revision_is_refused(self, place, history, tmp_path):
        """The author published new weights, and the old measurement with them."""
        first, second = history
        stale = tmp_path / "stale"
        shutil.copytree(second[0], stale, ignore=shutil.ignore_patterns("sidecar"))
        shutil.copytree(first[0] / "sidecar", stale / "sidecar")
        place.hub.publish("me/a", stale)
        with pytest.raises(PlanningError) as info:
            merged(recipe_of("me/a", "me/a@v1"), tmp_path / "out")
        (problem,) = info.value.problems
        assert f"the sidecar {place.snapshot('me/a') / 'sidecar'} was measured on other" in problem
        assert problem.endswith("Run: mergekit-fisher precompute RECIPE")


class TestOffline:
    def test_precompute_reads_a_cache_laid_out_by_hand(self, place, pair, tmp_path):
        """Of blobs, references, and snapshots that are links."""
        for name in ("me/a", "me/b"):
            snapshot = place.hub.cached(name, place.cache)
            assert (snapshot / "config.json").is_symlink()
        place.go(online=False)
        recipe = on_data(tmp_path, "me/a", "me/b")
        assert "Measured 1 of 2 models" in succeed(recipe)
        assert (place.own / "me--b" / "fisher.safetensors").is_file()
        assert place.hub.downloads == []

    def test_precompute_reads_what_mergekit_has_downloaded(self, place, pair, tmp_path):
        """There are fewer files than it would download itself, and a list that says so."""
        (pair[1][0] / "chat_template.jinja").write_text(tiny.CHAT_TEMPLATE)
        place.hub.publish("me/b", pair[1][0])
        LoaderCache().get(ModelReference.parse("me/b"))
        place.go(online=False)
        assert not (place.snapshot("me/b") / "chat_template.jinja").exists()
        assert "Measured 1 of 1 models" in succeed(on_data(tmp_path, "me/b"))

    def test_a_model_that_is_not_cached(self, place, pair, tmp_path):
        place.go(online=False)
        said = refuse(on_data(tmp_path, "me/b"))
        assert "me/b is neither a local folder nor a model that can be downloaded" in said
        assert "outgoing traffic has been disabled" in said

    def test_snapshots_are_merged_by_their_folders(self, place, pair, tmp_path):
        """With what their author published, and what was measured beside it."""
        a, b = (place.hub.cached(name, place.cache) for name in ("me/a", "me/b"))
        place.go(online=False)
        recipe = on_data(tmp_path, str(b))
        succeed(recipe)
        found = merged(recipe_of(a, b), tmp_path / "out")
        measured = (pair[1][0], pair[1][1], fisher_of(b))
        assert_close(found, by_hand(pair[0], measured))

    def test_mergekit_itself_takes_no_names(self, place, pair, tmp_path):
        """If a later version does, docs/recipe.md has a sentence too many."""
        for name in ("me/a", "me/b"):
            place.hub.cached(name, place.cache)
        place.go(online=False)
        with pytest.raises(huggingface_hub.errors.OfflineModeIsEnabled):
            merged(recipe_of("me/a", "me/b", method="linear"), tmp_path / "out")


class TestTransformersCache:
    def test_both_commands_find_models_there(self, place, pair, tmp_path):
        """The configuration alone is read by transformers, from its usual cache."""
        cache = tmp_path / "cache"
        recipe = on_data(tmp_path, "me/a", "me/b")
        said = succeed(recipe, "--transformers-cache", cache)
        assert f"Next: mergekit-yaml {recipe} merged/ --transformers-cache {cache}" in said
        published = place.snapshot("me/a", cache=cache) / "sidecar"
        assert f"me/a: {published} is valid" in said
        content = yaml.safe_load(recipe.read_text())
        found = merged(content, tmp_path / "out", transformers_cache=str(cache))
        measured = (*pair[1][:2], fisher_of(place.own, place.own / "me--b"))
        assert_close(found, by_hand(pair[0], measured))
        usual = {p.name for p in place.cache.rglob("*") if p.is_file()}
        assert not {"model.safetensors", "fisher.safetensors"} & usual

        place.go(online=False)
        assert "Measured 0 of 2 models" in succeed(recipe, "--transformers-cache", cache)
        refuse(recipe)

    def test_the_command_that_mends_names_it(self, place, pair, tmp_path):
        cache = tmp_path / "cache"
        with pytest.raises(PlanningError) as info:
            merged(recipe_of("me/a", "me/b"), tmp_path / "out", transformers_cache=str(cache))
        command = f"Run: mergekit-fisher precompute RECIPE --transformers-cache {cache}"
        assert info.value.problems[0].endswith(command)


@pytest.mark.slow
class TestAdapters:
    def test_of_the_hub_on_a_model_of_the_hub(self, place, pair, tmp_path):
        """Published under the base's name, in the adapter's repository."""
        (a, theta_a, fisher_a), (b, theta_b, _) = pair
        adapter = make_adapter(
            tmp_path / "lora", b, model_class="LlamaForCausalLM", task_type="CAUSAL_LM",
            target_modules=["q_proj", "down_proj"],
        )  # fmt: skip
        place.hub.publish("me/lora", adapter)
        merges = tmp_path / "merges"
        recipe = on_data(tmp_path, "me/a", "me/b+me/lora")
        said = succeed(recipe, "--lora-merge-cache", merges)
        own = place.own / "me--lora+me--b"
        assert f"wrote {own}" in said

        (folder,) = merges.iterdir()
        theta = read(folder)
        scaled = adapter_product(adapter, "model.layers.0.mlp.down_proj.weight")
        name = "model.layers.0.mlp.down_proj.weight"
        torch.testing.assert_close(theta[name], theta_b[name] + scaled)
        expected = by_hand((a, theta_a, fisher_a), (folder, theta, fisher_of(own, own)))
        content = yaml.safe_load(recipe.read_text())
        options = {"lora_merge_cache": str(merges)}
        assert_close(merged(content, tmp_path / "out", **options), expected)

        shutil.move(own, adapter / "sidecar-me--b")
        place.hub.publish("me/lora", adapter)
        LoaderCache.loaders.clear()
        assert_close(merged(content, tmp_path / "again", **options), expected)
        assert "me/lora/sidecar-me--b/fisher.safetensors" in place.hub.downloads

    def test_merged_in_another_dtype(self, place, pair, tmp_path):
        """What is measured is what mergekit makes of them: here in half precision."""
        (_, _, _), (b, *_) = pair
        adapter = make_adapter(
            tmp_path / "lora", b, model_class="LlamaForCausalLM", task_type="CAUSAL_LM",
            target_modules=["q_proj"],
        )  # fmt: skip
        flags = ("--lora-merge-cache", tmp_path / "merges", "--lora-merge-dtype", "bfloat16")
        recipe = on_data(tmp_path, f"{b}+{adapter}", str(b))
        said = succeed(recipe, *flags)
        assert "--lora-merge-dtype bfloat16" in said
        (folder,) = (tmp_path / "merges").iterdir()
        theta = read(folder)
        assert {t.dtype for t in theta.values()} == {torch.bfloat16}
        content = yaml.safe_load(recipe.read_text())
        options = {"lora_merge_cache": str(tmp_path / "merges"), "lora_merge_dtype": "bfloat16"}
        assert merged(content, tmp_path / "out", **options)
        # Another precision, in another cache: other weights than were measured.
        options = {"lora_merge_cache": str(tmp_path / "other")}
        LoaderCache.loaders.clear()
        with pytest.raises(PlanningError, match="was measured on other weights"):
            merged(content, tmp_path / "refused", **options)


@pytest.mark.slow
def test_by_the_commands(place, pair, tmp_path):
    """Processes of their own, with nothing but the environment."""
    recipe = on_data(tmp_path, "me/a@v1", "me/b")
    environment = {
        "HF_ENDPOINT": place.url,
        "HF_HUB_OFFLINE": 0,
        "HF_HOME": tmp_path / "hf",
        "FISHER_MERGEKIT_HOME": tmp_path / "mine",
    }
    process = command("mergekit-fisher", "precompute", recipe, "--force", **environment)
    assert process.returncode == 0, process.stderr
    out = tmp_path / "out"
    process = command("mergekit-yaml", recipe, out, "--quiet", **environment)
    assert process.returncode == 0, process.stderr
    own = [fisher_of(out, tmp_path / "mine" / name) for name in ("me--a@v1", "me--b")]
    models = [(*made[:2], fishers) for made, fishers in zip(pair, own, strict=True)]
    assert_close(read(out), by_hand(*models))
    assert (out / "tokenizer.json").is_file()
    assert "me/a" in (out / "README.md").read_text()


def adapter_product(adapter: Path, name: str) -> torch.Tensor:
    """Return what an adapter adds to a weight."""
    own = load_file(adapter / "adapter_model.safetensors")
    part = f"base_model.model.{name.removesuffix('.weight')}"
    return 1.5 * own[f"{part}.lora_B.weight"] @ own[f"{part}.lora_A.weight"]
