"""Bad input: every refusal, its words and its remedy; nothing is written before it."""

import shutil

import pytest
import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from models import (
    make_measured,
    make_model,
    random_fishers,
    read,
    rewrite,
    write_fishers,
)
from running import merged, recipe_of
from sidecars import rewrite_header

from fisher_mergekit.errors import CheckpointError, FisherMergekitError, PlanningError, SidecarError


@pytest.fixture
def pair(tmp_path):
    """Return the folders of two measured classifiers of one task."""
    return [make_measured(tmp_path / name, seed=i)[0] for i, name in enumerate("ab")]


def problems(recipe, out, **options):
    """Return what planning says; it says it before anything is written."""
    with pytest.raises(PlanningError) as info:
        run_merge(
            MergeConfiguration.model_validate(recipe),
            str(out),
            MergeOptions.model_validate({"quiet": True, **options}),
        )
    assert not out.exists()
    return info.value.problems


def problem(recipe, out, **options):
    """Return what planning says, which is one thing."""
    (message,) = problems(recipe, out, **options)
    return message


MEASURE = "Run: mergekit-fisher precompute RECIPE"


class TestSidecars:
    def test_none(self, pair, tmp_path):
        shutil.rmtree(pair[1] / "sidecar")
        message = problem(recipe_of(*pair), tmp_path / "out")
        assert message == f"{pair[1]}: there is no sidecar at {pair[1] / 'sidecar'}. {MEASURE}"

    def test_none_in_a_sliced_recipe(self, pair, tmp_path):
        shutil.rmtree(pair[1] / "sidecar")
        sources = [{"model": str(folder), "layer_range": [0, 2]} for folder in pair]
        recipe = {"merge_method": "fisher", "slices": [{"sources": sources}], "dtype": "float32"}
        message = problem(recipe, tmp_path / "out")
        assert message == f"{pair[1]}: there is no sidecar at {pair[1] / 'sidecar'}. {MEASURE}"

    def test_of_other_weights(self, pair, tmp_path):
        weights = read(pair[1])
        weights["classifier.bias"] += 1e-3
        weights["classifier.weight"] += 1e-3
        rewrite(pair[1], weights)
        message = problem(recipe_of(*pair), tmp_path / "out")
        assert message == (
            f"{pair[1]}: the sidecar {pair[1] / 'sidecar'} was measured on other weights (digest "
            f"of classifier.bias differs, and 1 more). {MEASURE}"
        )

    def test_of_the_other_model(self, pair, tmp_path):
        recipe = recipe_of(*pair)
        recipe["models"][0]["parameters"] = {"sidecar": str(pair[1] / "sidecar")}
        assert "was measured on other weights" in problem(recipe, tmp_path / "out")

    def test_foreign_only_where_nothing_is_merged(self, pair, tmp_path):
        """An excluded head may have been trained further: its statistics are not used."""
        weights = read(pair[1])
        weights["classifier.bias"] += 1
        rewrite(pair[1], weights)
        recipe = recipe_of(*pair, base_model=str(pair[0]), parameters={"exclude": "classifier"})
        assert merged(recipe, tmp_path / "out")

    @pytest.mark.parametrize(
        ("damage", "words"),
        [
            (lambda raw: raw[:-100], "is truncated"),
            (lambda raw: b"", "is empty (0 bytes)"),
            (lambda raw: b"\x80\x04\x95" + raw, "is a pickle"),
            (lambda raw: b"PK\x03\x04" + bytes(100), "is a pickle"),
            (lambda raw: raw[:8] + b"?" + raw[9:], "is not a readable safetensors file"),
        ],
    )
    def test_damaged_file(self, pair, tmp_path, damage, words):
        file = pair[1] / "sidecar" / "fisher.safetensors"
        file.write_bytes(damage(file.read_bytes()))
        message = problem(recipe_of(*pair), tmp_path / "out")
        assert message.startswith(f"{pair[1]}: the sidecar is damaged: {file}")
        assert words in message
        assert message.endswith(MEASURE)

    def test_unreadable_header(self, pair, tmp_path):
        (pair[1] / "sidecar" / "header.json").write_text("{")
        message = problem(recipe_of(*pair), tmp_path / "out")
        assert "is not a readable sidecar header" in message
        assert message.endswith(MEASURE)

    def test_other_kind_only(self, pair, tmp_path):
        def rename(content: dict) -> None:
            content["kinds"]["gram"] = content["kinds"].pop("fisher")

        rewrite_header(pair[1] / "sidecar", rename)
        message = problem(recipe_of(*pair), tmp_path / "out")
        assert "has no complete 'fisher'; it has gram." in message
        assert message.endswith(MEASURE)

    def test_flipped_bit_is_found_while_loading(self, pair, tmp_path):
        file = pair[1] / "sidecar" / "fisher.safetensors"
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)
        with pytest.raises(
            SidecarError, match=r"checksum differs\)\. .* RECIPE --model .*b --force"
        ):
            merged(recipe_of(*pair), tmp_path / "out")
        assert not list((tmp_path / "out").glob("*.safetensors"))

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_not_finite(self, pair, tmp_path, value):
        fishers = random_fishers(pair[1], 1)
        fishers["classifier.bias"][0] = value
        write_fishers(pair[1], fishers)
        message = problem(recipe_of(*pair), tmp_path / "out")
        assert f"is corrupt: the sum of squares of classifier.bias is {value}." in message
        assert message.endswith(f"{MEASURE} --model {pair[1]} --force")

    def test_negative_is_found_while_loading(self, pair, tmp_path):
        fishers = random_fishers(pair[1], 1)
        fishers["classifier.bias"][0] = -1
        write_fishers(pair[1], fishers)
        with pytest.raises(
            SidecarError, match=r"b is corrupt: classifier.bias holds values from -"
        ):
            merged(recipe_of(*pair), tmp_path / "out")

    def test_a_zero_with_a_minus_sign_is_none(self, pair, tmp_path):
        fishers = random_fishers(pair[1], 1)
        merges = []
        for zero in (0.0, -0.0):
            fishers["classifier.bias"][0] = zero
            write_fishers(pair[1], fishers)
            merges.append(merged(recipe_of(*pair), tmp_path / f"out{zero}"))
        one, other = merges
        assert all(torch.equal(one[name], other[name]) for name in one)

    def test_all_zero(self, pair, tmp_path):
        fishers = {n: f.zero_() for n, f in random_fishers(pair[1], 1).items()}
        fishers["classifier.bias"][0] = 1  # the head knows something, but is not merged
        write_fishers(pair[1], fishers)
        recipe = recipe_of(*pair, base_model=str(pair[0]), parameters={"exclude": "classifier"})
        message = problem(recipe, tmp_path / "out")
        assert "is zero in all 39 merged tensors, so the model is sure of nothing" in message

    def test_partial(self, pair, tmp_path):
        fishers = random_fishers(pair[1], 1)
        del fishers["bert.pooler.dense.bias"], fishers["classifier.bias"]
        write_fishers(pair[1], fishers)
        message = problem(recipe_of(*pair), tmp_path / "out")
        assert "is partial: it says nothing of bert.pooler.dense.bias, and 1 more." in message
        assert message.endswith(f"{MEASURE} --model {pair[1]} --force")

    def test_parameter_of_one_model_only(self, pair, tmp_path):
        fishers = random_fishers(pair[1], 1)
        del fishers["classifier.bias"]
        write_fishers(pair[1], fishers, unmeasured={"classifier.bias": "a buffer"})
        message = problem(recipe_of(*pair), tmp_path / "out")
        assert (
            f"classifier.bias was measured in {pair[0]}, but not in {pair[1]} (a buffer)."
            in message
        )

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("estimator", "empirical"),
            ("unit", "token"),
            ("likelihood", "causal_lm"),
            ("max_length", 512),
        ],
    )
    def test_measured_differently(self, pair, tmp_path, key, value):
        write_fishers(pair[1], random_fishers(pair[1], 1), **{key: value})
        message = problem(recipe_of(*pair), tmp_path / "out")
        assert message.startswith(f"the models were measured with different {key}: ")
        assert f"{value} for {pair[1]}." in message
        assert "`allow_mixed: true`" in message
        assert merged(recipe_of(*pair, parameters={"allow_mixed": True}), tmp_path / "out")

    def test_path_that_is_no_text(self, pair, tmp_path):
        recipe = recipe_of(*pair)
        recipe["models"][0]["parameters"] = {"sidecar": 3}
        message = problem(recipe, tmp_path / "out")
        assert "expected a folder or a .safetensors file, got 3." in message


class TestSettings:
    @pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf")])
    def test_impossible_lambda(self, pair, tmp_path, value):
        message = problem(recipe_of(*pair, lambdas=[1, value]), tmp_path / "out")
        assert message.startswith(f"lambda of {pair[1]} is {value} for bert.")
        assert message.endswith("it must be a finite number, 0 or more.")

    def test_lambda_that_is_no_number(self, pair, tmp_path):
        message = problem(recipe_of(*pair, lambdas=["much", 1]), tmp_path / "out")
        assert message == f"lambda of {pair[0]}: expected a number, got 'much'."

    def test_number_that_yaml_reads_as_text(self, pair, tmp_path):
        assert merged(recipe_of(*pair, parameters={"floor": "1e-6"}), tmp_path / "out")

    def test_all_lambdas_zero(self, pair, tmp_path):
        recipe = recipe_of(*pair, lambdas=[[{"filter": "pooler", "value": 0}, {"value": 1}], 0])
        message = problem(recipe, tmp_path / "out")
        assert "every model's lambda is 0 for bert.pooler.dense.weight and 1 more" in message

    def test_lambda_and_weight(self, pair, tmp_path):
        recipe = recipe_of(*pair, lambdas=[1, 1], parameters={"weight": 0.5})
        assert "both `lambda` and `weight` are used" in problem(recipe, tmp_path / "out")

    def test_misspelt_parameters(self, pair, tmp_path):
        recipe = recipe_of(*pair, parameters={"normalise_fishers": True})
        recipe["models"][0]["parameters"] = {"lamda": 1, "floor": 1}
        first, second, third = problems(recipe, tmp_path / "out")
        assert "'normalise_fishers'. Did you mean 'normalize_fishers'?" in first
        assert f"parameters of {pair[0]}: unknown parameter 'lamda'. Did you mean" in second
        assert third.endswith("'floor' belongs under the recipe's own parameters.")

    @pytest.mark.parametrize(
        ("key", "value", "words"),
        [
            ("floor", -1e-6, "floor is -1e-06; it must be a finite number, 0 or more."),
            ("floor", float("inf"), "floor is inf;"),
            ("floor", "low", "floor: expected a number, got 'low'."),
            ("normalize_fishers", "perhaps", "expected true or false, got 'perhaps'."),
        ],
    )
    def test_impossible_options(self, pair, tmp_path, key, value, words):
        message = problem(recipe_of(*pair, parameters={key: value}), tmp_path / "out")
        assert words in message

    def test_favor_base_that_is_not_merged(self, pair, tmp_path):
        base = make_model(tmp_path / "base", seed=5)
        recipe = recipe_of(*pair, base_model=str(base), parameters={"favor_base": True})
        message = problem(recipe, tmp_path / "out")
        assert "`favor_base: true` needs base_model among the merged models" in message

    def test_dtype_that_is_none(self, pair, tmp_path):
        message = problem(recipe_of(*pair, dtype="fp32"), tmp_path / "out")
        assert message == "dtype: 'fp32' is not one of float32, float16, bfloat16, float64."

    def test_model_listed_twice(self, pair, tmp_path):
        message = problem(recipe_of(*pair, pair[0]), tmp_path / "out")
        assert f"{pair[0]} is listed twice" in message


class TestTensors:
    def test_exclude_without_base_model(self, pair, tmp_path):
        recipe = recipe_of(*pair, parameters={"exclude": "classifier"})
        assert "the recipe names none. Add `base_model:`" in problem(recipe, tmp_path / "out")

    def test_exclude_that_matches_nothing(self, pair, tmp_path):
        recipe = recipe_of(*pair, base_model=str(pair[0]), parameters={"exclude": ["clasifier"]})
        message = problem(recipe, tmp_path / "out")
        assert message == (
            "exclude: 'clasifier' is in the name of no tensor of this merge. "
            "Did you mean 'classifier'?"
        )

    def test_exclude_of_a_tied_head_matches_nothing(self, tmp_path):
        models = [make_measured(tmp_path / n, "qwen2", seed=i)[0] for i, n in enumerate("ab")]
        recipe = recipe_of(*models, base_model=str(models[0]), parameters={"exclude": "lm_head"})
        assert "is in the name of no tensor" in problem(recipe, tmp_path / "out")

    @pytest.mark.parametrize("raw", [3, {"value": "classifier"}, [1, 2]])
    def test_exclude_that_is_no_name(self, pair, tmp_path, raw):
        recipe = recipe_of(*pair, base_model=str(pair[0]), parameters={"exclude": raw})
        assert "parameters.exclude: expected a list of name parts" in problem(
            recipe, tmp_path / "out"
        )

    @pytest.mark.parametrize("has_base", [True, False])
    def test_missing_head(self, pair, tmp_path, has_base):
        rewrite(pair[1], {n: t for n, t in read(pair[1]).items() if "classifier" not in n})
        write_fishers(pair[1], random_fishers(pair[1], 1))
        recipe = recipe_of(*pair, base_model=str(pair[0]) if has_base else None)
        message = problem(recipe, tmp_path / "out")
        assert message == (
            f"not every model has every tensor: {pair[1]} lacks classifier.bias, "
            "classifier.weight. To keep base_model's own, write under `parameters:` the line "
            "`exclude: [classifier]`"
            + (
                ""
                if has_base
                else ", and at the top `base_model:` with the model to take them from"
            )
            + "."
        )

    def test_missing_from_base_model(self, pair, tmp_path):
        rewrite(pair[1], {n: t for n, t in read(pair[1]).items() if "pooler" not in n})
        write_fishers(pair[1], random_fishers(pair[1], 1))
        message = problem(recipe_of(*pair, base_model=str(pair[1])), tmp_path / "out")
        assert f"base_model {pair[1]} itself lacks bert.pooler.dense.weight" in message
        recipe = recipe_of(*pair, base_model=str(pair[1]), parameters={"exclude": "classifier"})
        rewrite(pair[1], {n: t for n, t in read(pair[1]).items() if "classifier" not in n})
        write_fishers(pair[1], random_fishers(pair[1], 1))
        assert any(
            "excluded tensors come from base_model" in p for p in problems(recipe, tmp_path / "out")
        )

    def test_only_in_unlisted_base_model(self, pair, tmp_path):
        """Else the output would silently lack it."""
        base = make_model(tmp_path / "base", seed=5)
        for i, folder in enumerate(pair):
            rewrite(folder, {n: t for n, t in read(folder).items() if "pooler" not in n})
            write_fishers(folder, random_fishers(folder, i))
        message = problem(recipe_of(*pair, base_model=str(base)), tmp_path / "out")
        assert "the line `exclude: [pooler]`." in message

    def test_vocabularies_differ(self, pair, tmp_path):
        other, _, _ = make_measured(tmp_path / "c", seed=3, vocab_size=30)
        message = problem(recipe_of(pair[0], other), tmp_path / "out")
        assert message.startswith("the models' vocabularies differ: bert.embeddings.word")
        assert f"[24, 8] in {pair[0]}, [30, 8] in {other}" in message
        assert "write at the top `tokenizer_source: union`" in message

    def test_half_a_head_differs(self, tmp_path):
        """RoBERTa's head is two layers, of which only one has the labels' size."""
        models = [
            make_measured(tmp_path / f"{n}", "roberta", seed=n, num_labels=n)[0] for n in (2, 3)
        ]
        message = problem(recipe_of(*models, base_model=str(models[0])), tmp_path / "out")
        assert message.endswith(
            "the line `exclude: [classifier]` (it takes classifier.dense.weight, "
            "classifier.dense.bias too)."
        )

    def test_body_of_other_shape(self, pair, tmp_path):
        other, _, _ = make_measured(tmp_path / "c", seed=3, max_position_embeddings=20)
        message = problem(recipe_of(pair[0], other), tmp_path / "out")
        assert "`exclude: [position_embeddings]`" in message

    def test_models_with_nothing_in_common(self, pair, tmp_path):
        """No advice to exclude nearly everything."""
        other, _, _ = make_measured(tmp_path / "c", seed=3, hidden_size=4)
        assert any(
            m.startswith("tensors differ in shape") and m.endswith("of one architecture and size.")
            for m in problems(recipe_of(pair[0], other), tmp_path / "out")
        )

    def test_layer_range_beyond_the_last_layer(self, tmp_path):
        a, _, _ = make_measured(tmp_path / "a", "llama", seed=1)
        sources = [{"model": str(a), "layer_range": [1, 3]}]
        recipe = {"merge_method": "fisher", "slices": [{"sources": sources}]}
        message = problem(recipe, tmp_path / "out")
        assert "model.layers.2.input_layernorm.weight" in message
        assert "a `layer_range` goes beyond the last layer" in message

    def test_buffers_differ(self, pair, tmp_path):
        for i, folder in enumerate(pair):
            weights = {**read(folder), "bert.embeddings.position_ids": torch.arange(16)[None] + i}
            rewrite(folder, weights)
            write_fishers(folder, random_fishers(folder, i))
        message = problem(recipe_of(*pair), tmp_path / "out")
        assert "buffers that are no floating-point numbers differ between the models" in message

    @pytest.mark.parametrize(
        ("dtype", "name"),
        [
            (torch.float8_e4m3fn, "F8_E4M3"),
            (torch.float8_e8m0fnu, "F8_E8M0"),
            (torch.complex64, "C64"),
        ],
    )
    def test_quantised_or_odd(self, pair, tmp_path, dtype, name):
        weights = read(pair[1])
        weights["classifier.weight"] = weights["classifier.weight"].to(dtype)
        rewrite(pair[1], weights)
        write_fishers(pair[1], random_fishers(pair[0], 1))
        assert (
            f"{pair[1]}: classifier.weight is stored as {name}, which cannot be averaged."
            in problems(recipe_of(*pair), tmp_path / "out")[0]
        )

    def test_nan_in_weights(self, pair, tmp_path):
        weights = read(pair[1])
        weights["bert.pooler.dense.bias"][3] = torch.nan
        rewrite(pair[1], weights)
        write_fishers(pair[1], random_fishers(pair[1], 1))
        with pytest.raises(CheckpointError) as info:
            merged(recipe_of(*pair), tmp_path / "out")
        assert info.value.message.startswith(
            f"bert.pooler.dense.bias of {pair[1]} holds NaN or infinite weights"
        )

    def test_result_too_large_for_its_dtype(self, pair, tmp_path):
        for i, folder in enumerate(pair):
            rewrite(folder, {n: t * 1e6 for n, t in read(folder).items()})
            write_fishers(folder, random_fishers(folder, i))
        with pytest.raises(CheckpointError, match=r"does not fit into torch.float16"):
            merged(recipe_of(*pair, dtype="float16"), tmp_path / "out")

    @pytest.mark.parametrize(
        ("config", "words"),
        [
            ({"num_hidden_layers": 3}, "the merged model lacks model.layers.2.input_layernorm"),
            ({"num_hidden_layers": 1}, "the merged model also has model.layers.1."),
            ({"hidden_size": 4}, "is [24, 4]; merged it is [24, 8]."),
        ],
    )
    def test_unlisted_base_model_of_other_sizes(self, tmp_path, config, words):
        """It gives the configuration, so the output could not be loaded."""
        models = [make_measured(tmp_path / n, "llama", seed=i)[0] for i, n in enumerate("ab")]
        base = make_model(tmp_path / "base", "llama", **config)
        message = problem(recipe_of(*models, base_model=str(base)), tmp_path / "out")
        assert words in message
        assert "`base_model:`" in message

    def test_models_of_different_depth(self, pair, tmp_path):
        other, _, _ = make_measured(tmp_path / "c", num_hidden_layers=3)
        message = problem(recipe_of(pair[0], other), tmp_path / "out")
        assert "must contain the same number of layers" in message

    def test_architecture_that_mergekit_describes_wrongly(self, tmp_path):
        models = [make_measured(tmp_path / n, "t5", seed=i)[0] for i, n in enumerate("ab")]
        message = problems(recipe_of(*models), tmp_path / "out")[0]
        assert "DenseReluDense.wi_0.weight" in message
        assert "and no model has it" in message


class TestNotBuiltYet:
    def test_pickled_checkpoint(self, pair, tmp_path):
        torch.save(read(pair[1]), pair[1] / "pytorch_model.bin")
        (pair[1] / "model.safetensors").unlink()
        message = problem(recipe_of(*pair), tmp_path / "out")
        assert message.startswith(f"{pair[1]}: {pair[1]} holds only pickled weights")

    def test_parameters_that_mergekit_leaves_out(self, tmp_path):
        """It would write a Llama without its biases."""
        models = [
            make_measured(tmp_path / n, "llama", seed=i, attention_bias=True)[0]
            for i, n in enumerate("ab")
        ]
        message = problem(recipe_of(*models), tmp_path / "out")
        assert "mergekit does not know model.layers.0.self_attn.q_proj.bias" in message
        assert "so the merged model would lack them" in message

    def test_kernel_called_directly(self):
        from mergekit.merge_methods import merge_state_dicts, merge_tensors

        tensors = [torch.zeros(2), torch.ones(2)]
        for call in (
            lambda: merge_tensors(tensors, "fisher"),
            lambda: merge_state_dicts([{"w": t} for t in tensors], "fisher"),
        ):
            with pytest.raises(FisherMergekitError, match="write a recipe and run mergekit-yaml"):
                call()


def test_everything_at_once(pair, tmp_path):
    other, _, _ = make_measured(tmp_path / "c", seed=3, num_labels=5)
    shutil.rmtree(pair[1] / "sidecar")
    write_fishers(other, random_fishers(other, 3), estimator="sampled")
    recipe = recipe_of(
        *pair, other, lambdas=[1, 1, -2], base_model=str(pair[0]), parameters={"exlude": "x"}
    )
    messages = problems(recipe, tmp_path / "out")
    for words in (
        "unknown parameter 'exlude'. Did you mean 'exclude'?",
        "the line `exclude: [classifier]`.",
        f"lambda of {other} is -2.0",
        "there is no sidecar",
        "different estimator",
    ):
        assert sum(words in message for message in messages) == 1, words
    assert len(messages) == 5


def test_warning_of_a_merged_task_head(pair, tmp_path, caplog):
    recipe = recipe_of(*pair, base_model=str(pair[0]))
    merged(recipe, tmp_path / "1")
    (record,) = [r for r in caplog.records if "task head" in r.message]
    assert record.levelname == "WARNING"
    assert "(classifier.bias, classifier.weight)" in record.message
    assert "the line `exclude: [classifier]`." in record.message
    caplog.clear()
    merged({**recipe, "parameters": {"exclude": "classifier.bias"}}, tmp_path / "half")
    (message,) = [r.message for r in caplog.records if "task head" in r.message]
    assert "(classifier.weight)" in message
    caplog.clear()
    merged({**recipe, "parameters": {"exclude": "classifier"}}, tmp_path / "2")
    assert not [r for r in caplog.records if "task head" in r.message]
