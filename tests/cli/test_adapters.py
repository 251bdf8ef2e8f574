"""LoRA adapters: their own parameters, and models with an adapter merged into them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import merge_oracle
import oracles
import pytest
import tiny
import torch
import transformers
from adapters import make_adapter
from factors import Described, merged_model
from models import make_model, read, rewrite
from oracles import assert_same_fishers
from peft import PeftModel
from precomputing import fisher_of, flags, refuse, snapshot, succeed, write_recipe
from running import assert_close, mergekit_yaml
from safetensors.torch import load_file, save_file
from tiny import ROWS

from fisher_mergekit.measure.batches import Example
from fisher_mergekit.sidecar.reader import Sidecar

pytestmark = pytest.mark.slow  # exhaustive: not needed at every change

QUERIES = {"target_modules": ["query", "value"]}


def encoded(folder: Path, *, labels: bool = True) -> list[Example]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if labels:
        return [
            tiny.labelled(i, **{k: x[k] for k in ("input_ids", "token_type_ids")})
            for i, x in enumerate(tokenizer(row["text"]) for row in ROWS)
        ]
    return [tiny.text(i, tokenizer(row["text"])["input_ids"]) for i, row in enumerate(ROWS)]


def filed(fishers: dict) -> dict:
    """Give what peft has in memory its names in the files, and drop the frozen model."""
    return {
        "base_model.model."
        + name.replace(".modules_to_save.default", "")
        .replace("lora_magnitude_vector.default.weight", "lora_magnitude_vector")
        .replace(".default", ""): value
        for name, value in fishers.items()
        if ".default" in name
    }


def with_adapter(adapter: Path, base: Path, model_class: str, **config):
    model = getattr(transformers, model_class).from_pretrained(base, **config)
    return PeftModel.from_pretrained(model, adapter).get_base_model()


class TestAnAdapterAlone:
    """`--model ADAPTER` measures what is in the adapter's files, and nothing else."""

    @pytest.fixture
    def headless(self, tmp_path):
        """A model that was pretrained without any head."""
        folder = tiny.save_model(tmp_path / "headless")
        body = transformers.BertModel.from_pretrained(folder)
        body.save_pretrained(folder)
        return folder

    @pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}])
    def test_a_classifier_with_a_head_of_its_own(self, headless, data, tmp_path, options):
        adapter = make_adapter(
            tmp_path / "adapter", headless, model_class="BertForSequenceClassification",
            task_type="SEQ_CLS", labels=3, **QUERIES, **options,
        )  # fmt: skip
        succeed(*flags(adapter, data, "--label", "label"))
        model = with_adapter(adapter, headless, "BertForSequenceClassification", num_labels=3)
        expected = filed(oracles.exact_classifier(model, encoded(headless)))
        stored = load_file(adapter / "adapter_model.safetensors")
        found = fisher_of(adapter)
        assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in stored.items()}
        assert "base_model.model.classifier.weight" in found
        assert_same_fishers(found, expected)

    @pytest.mark.parametrize("targets", [["c_attn", "c_proj"], ["wte", "c_fc"]])
    def test_a_language_model(self, gpt2, data, tmp_path, targets):
        """Transposed layers, and embeddings."""
        adapter = make_adapter(
            tmp_path / "adapter", gpt2, model_class="GPT2LMHeadModel", task_type="CAUSAL_LM",
            target_modules=targets, fan_in_fan_out=True,
        )  # fmt: skip
        succeed(*flags(adapter, data, "--estimator", "empirical"))
        examples = encoded(gpt2, labels=False)
        given = {i: tiny.ids_of(example) for i, example in enumerate(examples)}
        model = with_adapter(adapter, gpt2, "GPT2LMHeadModel")
        expected = filed(oracles.causal_lm_given(model, examples, given))
        assert_same_fishers(fisher_of(adapter), expected)

    @pytest.fixture
    def adapter(self, bert, tmp_path):
        return make_adapter(
            tmp_path / "adapter", bert, model_class="BertForSequenceClassification",
            task_type="SEQ_CLS", **QUERIES,
        )  # fmt: skip

    @pytest.mark.parametrize("way", ["eager", "sdpa"])
    def test_attention_is_computed_as_asked(self, adapter, data, way):
        succeed(*flags(adapter, data, "--attn-implementation", way))
        sidecar = Sidecar(adapter / "sidecar", "fisher")
        assert sidecar.measurement.settings.attn_implementation == way
        page = (adapter / "sidecar" / "README.md").read_text()
        assert "mergekit does not merge adapters by themselves" in page

    def test_the_model_is_not_touched_and_a_second_run_measures_nothing(self, adapter, bert, data):
        before = snapshot(bert)
        succeed(*flags(adapter, data))
        assert snapshot(bert) == before
        done = snapshot(adapter / "sidecar")
        assert "is valid, nothing to measure" in succeed(*flags(adapter, data))
        assert snapshot(adapter / "sidecar") == done

    def test_one_that_was_trained_further_is_measured_again(self, adapter, data):
        succeed(*flags(adapter, data))
        stored = load_file(adapter / "adapter_model.safetensors")
        name = next(n for n in stored if "lora_B" in n)
        save_file({**stored, name: stored[name] + 1}, adapter / "adapter_model.safetensors")
        assert "Measured 1 of 1" in succeed(*flags(adapter, data))

    def test_its_model_is_gone(self, adapter, bert, data):
        shutil.rmtree(bert)
        assert "neither a local folder nor a model that can be downloaded" in refuse(
            *flags(adapter, data)
        )

    def test_a_head_that_nobody_has(self, headless, data, tmp_path):
        adapter = make_adapter(
            tmp_path / "a", headless, model_class="BertForSequenceClassification",
            task_type="SEQ_CLS", labels=3, **QUERIES,
        )  # fmt: skip
        stored = load_file(adapter / "adapter_model.safetensors")
        lost = {n: t for n, t in stored.items() if "classifier" not in n}
        save_file(lost, adapter / "adapter_model.safetensors")
        message = refuse(*flags(adapter, data))
        assert "nor the adapter has classifier.bias, classifier.weight" in message

    def test_tensors_are_missing(self, adapter, data):
        stored = load_file(adapter / "adapter_model.safetensors")
        lost = next(n for n in stored if "lora_A" in n)
        del stored[lost]
        save_file(stored, adapter / "adapter_model.safetensors")
        assert f"lacks {lost} of its adapter" in refuse(*flags(adapter, data))

    def test_values_that_are_not_finite(self, adapter, data):
        stored = load_file(adapter / "adapter_model.safetensors")
        name = next(n for n in stored if "lora_A" in n)
        stored[name][0, 0] = torch.nan
        save_file(stored, adapter / "adapter_model.safetensors")
        assert f"{name} in " in refuse(*flags(adapter, data))

    def test_made_up_tokens_are_refused(self, adapter, data):
        config = json.loads((adapter / "adapter_config.json").read_text())
        config |= {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        assert "puts made-up tokens before the text" in refuse(*flags(adapter, data))


class TestAModelWithAnAdapter:
    """`model: BASE+ADAPTER` is the model that mergekit merges the adapter into."""

    @pytest.fixture
    def pair(self, bert, tmp_path):
        """Return references of one model with two adapters."""
        adapters = [
            make_adapter(
                tmp_path / name, bert, model_class="BertForSequenceClassification", seed=i,
                task_type="SEQ_CLS", **QUERIES,
            )
            for i, name in enumerate("ab")
        ]  # fmt: skip
        return [f"{bert}+{adapter}" for adapter in adapters], adapters

    def by_hand(self, base, adapter):
        """Return W + α/r · B A, and the head that was saved with the adapter."""
        weights, own = read(base), load_file(adapter / "adapter_model.safetensors")
        for name in own:
            plain = name.removeprefix("base_model.model.")
            if ".lora_A." in plain:
                up = own[name.replace("lora_A", "lora_B")]
                weights[plain.replace(".lora_A", "")] += 1.5 * up @ own[name]
            elif ".lora_" not in plain:
                weights[plain] = own[name]
        return weights

    @pytest.mark.slow
    def test_measured_and_merged_as_by_hand(self, pair, bert, data, tmp_path):
        references, adapters = pair
        cache = str(tmp_path / "cache")
        recipe = write_recipe(
            tmp_path, *references, calibration={"path": str(data), "text": "text"},
            base_model=references[0],
        )  # fmt: skip
        said = succeed(recipe, "--lora-merge-cache", cache)
        assert f"Next: mergekit-yaml {recipe} merged/ --lora-merge-cache {cache}" in said

        thetas = [self.by_hand(bert, adapter) for adapter in adapters]
        fishers = [fisher_of(a, a / f"sidecar-{bert.name}") for a in adapters]
        for index, theta in enumerate(thetas):
            shutil.copytree(bert, tmp_path / str(index))
            rewrite(tmp_path / str(index), theta)
            model = transformers.BertForSequenceClassification.from_pretrained(
                tmp_path / str(index)
            )
            expected = oracles.exact_classifier(model, encoded(bert))
            assert_same_fishers(fishers[index], expected, relative=1e-4)

        content = tiny_recipe(references)
        place = adapters[1] / f"sidecar-{bert.name}"
        assert f"A folder called `{place.name}/`" in (place / "README.md").read_text()
        place.rename(adapters[1] / "away")
        process, _ = mergekit_yaml(content, tmp_path / "m", "--lora-merge-cache", cache)
        assert (
            f"there is no sidecar at {place}. "
            f"Run: mergekit-fisher precompute {tmp_path / 'm' / 'recipe.yml'} "
            f"--lora-merge-cache {cache}"
        ) in process.stderr
        (adapters[1] / "away").rename(place)
        process, out = mergekit_yaml(content, tmp_path / "m", "--lora-merge-cache", cache)
        assert process.returncode == 0, process.stderr
        assert_close(read(out), merge_oracle.merge(thetas, fishers, [0.7, 0.3], list(thetas[0])))

    @pytest.mark.parametrize(("method", "kind"), [("regmean", "gram"), ("mats", "kfac")])
    def test_merged_by_factors(self, pair, bert, data, tmp_path, method, kind):
        references, adapters = pair
        content = tiny_recipe(references) | {"merge_method": method}
        content["calibration"] = {"path": str(data), "text": "text"}
        cache = ("--lora-merge-cache", str(tmp_path / "cache"))
        made = []
        process, _ = mergekit_yaml(content, tmp_path / "m", *cache)
        assert process.stderr.count("there is no sidecar at") == 2
        succeed(tmp_path / "m" / "recipe.yml", *cache)
        for adapter in adapters:
            sidecar = Sidecar(adapter / f"sidecar-{bert.name}", kind)
            stored = {name: sidecar.load(name) for name in sidecar}
            thetas = self.by_hand(bert, adapter)
            made.append(Described(adapter, kind, thetas, sidecar.measurement.factors, stored))
        process, out = mergekit_yaml(content, tmp_path / "m", *cache)
        assert process.returncode == 0, process.stderr
        assert_close(read(out), merged_model(made, [0.7, 0.3]), rtol=1e-4, atol=1e-4)

    @pytest.mark.slow
    def test_a_merge_with_another_base_is_refused(self, pair, bert, data, tmp_path):
        """The same adapter on another model of the same name: digests tell them apart."""
        references, adapters = pair
        cache = ("--lora-merge-cache", str(tmp_path / "cache"))
        for reference in references:
            succeed("--model", reference, "--path", data, "--text", "text", *cache)
        other = make_model(tmp_path / "elsewhere" / bert.name, num_labels=3, seed=9)
        content = tiny_recipe([references[0], f"{other}+{adapters[1]}"])
        process, _ = mergekit_yaml(content, tmp_path / "m", *cache)
        assert process.returncode != 0
        assert "was measured on other weights" in process.stderr
        assert "Traceback" not in process.stderr

    def test_the_cache_is_asked_for(self, pair, data):
        message = refuse("--model", pair[0][0], "--path", data, "--text", "text")
        assert "Name one with --lora-merge-cache DIR, here and for mergekit-yaml." in message

    def test_a_broken_adapter_leaves_no_half_merge(self, pair, data, tmp_path):
        (pair[1][0] / "adapter_model.safetensors").write_bytes(b"")
        message = refuse(
            "--model", pair[0][0], "--path", data, "--text", "text",
            "--lora-merge-cache", tmp_path / "cache",
        )  # fmt: skip
        assert f"mergekit cannot merge {pair[0][0]}" in message
        assert not list((tmp_path / "cache").iterdir())

    def test_a_merge_that_fails_removes_nobody_else_s(self, pair, data, tmp_path, monkeypatch):
        """Another process may be making its own in the same cache."""

        def fail(*_: object, **__: object) -> None:
            (tmp_path / "cache" / "other").mkdir(parents=True)
            raise RuntimeError("broken")

        monkeypatch.setattr(PeftModel, "from_pretrained", fail)
        said = refuse(
            "--model", pair[0][0], "--path", data, "--text", "text",
            "--lora-merge-cache", tmp_path / "cache",
        )  # fmt: skip
        assert f"mergekit cannot merge {pair[0][0]}: broken" in said
        assert [path.name for path in (tmp_path / "cache").iterdir()] == ["other"]

    def test_what_an_interrupted_merge_left_is_named(self, pair, data, tmp_path):
        cache = tmp_path / "cache"
        arguments = ("--model", pair[0][0], "--path", data, "--text", "text")
        succeed(*arguments, "--lora-merge-cache", cache)
        (merged,) = cache.iterdir()
        (merged / "model.safetensors").unlink()
        message = refuse(*arguments, "--lora-merge-cache", cache)
        assert "remove that folder, and it is made anew" in message
        assert str(merged) in message


def tiny_recipe(references):
    models = [
        {"model": reference, "parameters": {"lambda": value}}
        for reference, value in zip(references, (0.7, 0.3), strict=True)
    ]
    return {
        "merge_method": "fisher",
        "models": models,
        "base_model": references[0],
        "dtype": "float32",
    }
