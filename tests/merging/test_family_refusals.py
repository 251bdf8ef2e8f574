"""Bad factors and bad parameters of `regmean` and `mats`: told at planning, with what mends it."""

import shutil

import pytest
import torch
from factors import Described, make_described, mean
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from models import random_fishers, rewrite, write_fishers
from running import merged, recipe_of
from sidecars import rewrite_header

from fisher_mergekit.errors import PlanningError, SidecarError
from fisher_mergekit.merging import output
from fisher_mergekit.sidecar.header import FactorNames

Q = "model.layers.0.self_attn.q_proj.weight"
O = "model.layers.1.self_attn.o_proj.weight"  # noqa: E741
MEASURE = "Run: mergekit-fisher precompute RECIPE"


@pytest.fixture
def pair(tmp_path):
    """Return two described language models."""
    return [make_described(tmp_path / n, "llama", seed=i) for i, n in enumerate("ab")]


def recipe(pair, method="regmean", **top):
    return recipe_of(*(made.folder for made in pair), method=method, **top)


def problems(content, out):
    with pytest.raises(PlanningError) as info:
        run_merge(MergeConfiguration.model_validate(content), str(out), MergeOptions(quiet=True))
    assert not out.exists()
    return info.value.problems


def problem(content, out):
    (message,) = problems(content, out)
    return message


def rewrite_factors(made, change):
    """Let `change` edit what the header says of the weights' factors."""
    folder = made.folder / "sidecar"
    rewrite_header(folder, lambda content: change(content["kinds"][made.kind]["factors"]))


class TestSidecars:
    def test_none(self, pair, tmp_path):
        shutil.rmtree(pair[1].folder / "sidecar")
        place = pair[1].folder / "sidecar"
        assert problem(recipe(pair), tmp_path / "out") == (
            f"{pair[1].folder}: there is no sidecar at {place}. "
            "Run: mergekit-fisher precompute RECIPE"
        )

    def test_none_in_a_sliced_recipe(self, pair, tmp_path):
        shutil.rmtree(pair[1].folder / "sidecar")
        sources = [{"model": str(made.folder), "layer_range": [0, 2]} for made in pair]
        content = {"merge_method": "regmean", "slices": [{"sources": sources}], "dtype": "float32"}
        assert problem(content, tmp_path / "out").endswith("Run: mergekit-fisher precompute RECIPE")

    def test_of_another_kind(self, pair, tmp_path):
        first, second = problems(recipe(pair, "mats"), tmp_path / "out")
        assert "has no complete 'kfac'; it has gram. Run: mergekit-fisher precompute REC" in first
        assert second.startswith(f"{pair[1].folder}: ")

    def test_of_other_weights(self, pair, tmp_path):
        rewrite(pair[1].folder, {n: t + 1e-3 if n == O else t for n, t in pair[1].thetas.items()})
        message = problem(recipe(pair), tmp_path / "out")
        assert f"was measured on other weights (digest of {O} differs). {MEASURE}" in message

    def test_a_bias_of_other_values_is_none_of_its_business(self, pair, tmp_path):
        name = "model.norm.weight"
        changed = {n: t + 1 if n == name else t for n, t in pair[1].thetas.items()}
        rewrite(pair[1].folder, changed)
        found = merged(recipe(pair), tmp_path / "out")
        expected = mean([pair[0].thetas[name], changed[name]], [1, 1])
        torch.testing.assert_close(found[name].double(), expected)

    def test_of_another_width(self, pair, tmp_path):
        pair[1].stored[f"{O}.inputs"] = torch.eye(6)
        pair[1].write()
        message = problem(recipe(pair), tmp_path / "out")
        assert (
            f"is corrupt: {O}.inputs has shape [6, 6], but its weight [8, 8] has 8 inputs. "
            f"{MEASURE}"
        ) in message
        assert message.startswith(f"{pair[1].folder}: ")

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_not_finite(self, pair, tmp_path, value):
        pair[1].stored[f"{O}.inputs"][0, 0] = value
        pair[1].write()
        message = problem(recipe(pair), tmp_path / "out")
        again = f"{MEASURE} --model {pair[1].folder} --force"
        assert f"is corrupt: the sum of squares of {O}.inputs is {value}. {again}" in message

    def test_not_symmetric(self, pair, tmp_path):
        factor = pair[1].stored[f"{O}.inputs"]
        factor[0, 1] += 0.1 * factor.abs().max()
        pair[1].write()
        message = problem(recipe(pair), tmp_path / "out")
        assert (
            f"is corrupt: {O}.inputs is not symmetric (it differs from its transpose by 1e-01 "
            in message
        )
        assert message.endswith(f"{MEASURE} --model {pair[1].folder} --force")

    def test_not_symmetric_is_found_while_loading_too(self, pair, tmp_path):
        """Where no header says so."""
        factor = pair[1].stored[f"{O}.inputs"]
        factor[0, 1] += 0.1 * factor.abs().max()
        pair[1].write()

        def forget(content):
            content["kinds"]["gram"]["tensors"][f"{O}.inputs"].pop("asymmetry")

        rewrite_header(pair[1].folder / "sidecar", forget)
        with pytest.raises(SidecarError, match=rf"is corrupt: {O}.inputs is not symmetric\. Run"):
            merged(recipe(pair), tmp_path / "out")

    @pytest.mark.parametrize("name", [O, "model.embed_tokens.weight"])
    def test_negative_is_found_while_loading(self, pair, tmp_path, name):
        factor = pair[1].stored[f"{name}.inputs"]
        factor.view(-1)[0] = -1
        pair[1].write()
        with pytest.raises(SidecarError, match="never negative") as info:
            merged(recipe(pair, parameters={"embeddings": True}), tmp_path / "out")
        assert f"{name}.inputs holds values from -" in info.value.message
        assert info.value.message.endswith(f"{MEASURE} --model {pair[1].folder} --force")

    def test_a_little_asymmetry_is_rounding(self, pair, tmp_path):
        factor = pair[1].stored[f"{O}.inputs"]
        exact = merged(recipe(pair), tmp_path / "exact")[O]
        factor[0, 1] += 1e-5 * factor.abs().max()
        pair[1].write()
        found = merged(recipe(pair), tmp_path / "out")[O]
        torch.testing.assert_close(found, exact, rtol=1e-2, atol=1e-2)

    def test_all_zero(self, pair, tmp_path):
        for factor in pair[1].stored.values():
            factor.zero_()
        pair[1].write()
        message = problem(recipe(pair), tmp_path / "out")
        assert "the gram in the sidecar" in message
        assert "is zero in all 16 merged tensors, so the model is sure of nothing" in message

    def test_partial(self, pair, tmp_path):
        pair[1].write(unmeasured={})
        message = problem(recipe(pair), tmp_path / "out")
        assert "is partial: it says nothing of model.layers.0.input_layernorm.weight" in message

    @pytest.mark.parametrize(("key", "value"), [("max_length", 512), ("likelihood", "causal_lm")])
    def test_measured_differently(self, pair, tmp_path, key, value):
        pair[1].write(**{key: value})
        message = problem(recipe(pair), tmp_path / "out")
        assert message.startswith(f"the models were measured with different {key}: ")
        assert merged(recipe(pair, parameters={"allow_mixed": True}), tmp_path / "out")

    def test_described_in_one_model_only(self, pair, tmp_path):
        del pair[1].factors[O], pair[1].stored[f"{O}.inputs"]
        pair[1].write()
        message = problem(recipe(pair), tmp_path / "out")
        assert message.startswith(
            f"the gram of {pair[0].folder} describes {O}, that of {pair[1].folder} does not (not "
            "described by gram). Measure both alike"
        )
        assert message.endswith("or keep it out with `exclude:`.")

    def test_inputs_along_another_axis(self, pair, tmp_path):
        rewrite_factors(pair[1], lambda factors: factors[O].update(input_axis=-2))
        message = problem(recipe(pair), tmp_path / "out")
        assert message.startswith(
            f"the gram of {O} is inputs [8, 8] along axis -1 in {pair[0].folder}, but inputs "
            f"[8, 8] along axis -2 in {pair[1].folder}. Measure both alike"
        )

    def test_a_diagonal_and_a_matrix(self, pair, tmp_path):
        pair[1].stored[f"{O}.inputs"] = pair[1].stored[f"{O}.inputs"].diag()
        pair[1].write()
        message = problem(recipe(pair), tmp_path / "out")
        assert f"{O} is inputs [8, 8] along axis -1 in" in message
        assert "but inputs [8] along axis -1 in" in message

    def test_a_head_that_is_tied_in_one_model_only(self, tmp_path):
        pair = [
            make_described(tmp_path / n, "llama", seed=i, tie_word_embeddings=bool(i))
            for i, n in enumerate("ab")
        ]
        name = "model.embed_tokens.weight"
        pair[1].factors[name] = FactorNames(inputs=f"{name}.inputs")  # the head's inputs
        pair[1].stored[f"{name}.inputs"] = torch.eye(8)
        pair[1].write()
        message = problems(recipe(pair, base_model=str(pair[1].folder)), tmp_path / "out")[0]
        assert f"the gram of {name} is inputs [24] along axis -2 in {pair[0].folder}" in message
        assert "Save both with one `tie_word_embeddings` and measure them again" in message
        assert "--force" not in message

    def test_outputs_of_one_model_only(self, tmp_path):
        pair = [make_described(tmp_path / n, "llama", "kfac", seed=i) for i, n in enumerate("ab")]
        del pair[1].stored[f"{O}.outputs"]
        pair[1].factors[O] = FactorNames(inputs=f"{O}.inputs")
        pair[1].write()
        message = problem(recipe(pair, "mats"), tmp_path / "out")
        assert f"the kfac of {O} is inputs [8, 8], outputs [8, 8] along axis -1" in message

    def test_parameters_that_mergekit_leaves_out(self, tmp_path, monkeypatch):
        """Of remote code, which is not loaded; a Gram does not describe biases, but knows them."""
        monkeypatch.setattr(output, "loads", lambda *_: [])
        made = make_described(tmp_path / "a", "llama", seed=0, attention_bias=True)
        sources = [{"model": str(made.folder), "layer_range": [0, 2]}]
        content = {"merge_method": "regmean", "slices": [{"sources": sources}], "dtype": "float32"}
        message = problem(content, tmp_path / "out")
        assert "mergekit does not know model.layers.0.self_attn.k_proj.bias" in message


class TestOthers:
    def test_no_fisher(self, pair, tmp_path):
        write_fishers(pair[0].folder, random_fishers(pair[0].folder, 0))
        pair[0].write()
        message = problem(recipe(pair, parameters={"others": "fisher"}), tmp_path / "out")
        assert message == (
            f"{pair[1].folder}: the sidecar {pair[1].folder / 'sidecar'} has no complete 'fisher'; "
            "it has gram. Run: mergekit-fisher precompute RECIPE"
        )

    def test_given_sidecars_hold_both_kinds(self, pair, tmp_path):
        place = tmp_path / "elsewhere"
        write_fishers(pair[1].folder, random_fishers(pair[1].folder, 1), out=place)
        pair[1].write(out=place)
        write_fishers(pair[0].folder, random_fishers(pair[0].folder, 0))
        pair[0].write()
        shutil.rmtree(pair[1].folder / "sidecar")
        content = recipe(pair, parameters={"others": "fisher"})
        content["models"][1]["parameters"] = {"sidecar": str(place)}
        assert merged(content, tmp_path / "out")

    def test_fishers_that_were_measured_differently(self, pair, tmp_path):
        for i, made in enumerate(pair):
            fishers = random_fishers(made.folder, i)
            write_fishers(made.folder, fishers, estimator=["exact", "empirical"][i])
            made.write()
        message = problem(recipe(pair, parameters={"others": "fisher"}), tmp_path / "out")
        assert message.startswith("the models were measured with different estimator: ")

    def test_a_parameter_of_one_model_only(self, pair, tmp_path):
        name = "model.norm.weight"
        for i, made in enumerate(pair):
            fishers = random_fishers(made.folder, i)
            if i:
                del fishers[name]
            write_fishers(made.folder, fishers, unmeasured={name: "a buffer"} if i else None)
            made.write()
        message = problem(recipe(pair, parameters={"others": "fisher"}), tmp_path / "out")
        assert message.startswith(f"{name} was measured in {pair[0].folder}, but not in")


@pytest.mark.parametrize(
    ("method", "key", "value", "words"),
    [
        ("regmean", "offdiagonal", 1.5, "is 1.5; it must be a finite number, from 0 to 1."),
        ("regmean", "offdiagonal", -0.1, "offdiagonal is -0.1; it must be"),
        ("regmean", "offdiagonal", "most", "offdiagonal: expected a number, got 'most'."),
        ("regmean", "ridge", -1, "ridge is -1.0; it must be a finite number, 0 or more."),
        ("regmean", "others", "fischer", "others: expected 'mean' or 'fisher', got 'fischer'."),
        ("regmean", "others", 3, "others: expected 'mean' or 'fisher', got 3."),
        ("regmean", "embeddings", "perhaps", "embeddings: expected true or false, got 'perhaps'."),
        ("regmean", "off_diagonal", 0.5, "'off_diagonal'. Did you mean 'offdiagonal'?"),
        ("regmean", "floor", 0, "unknown parameter 'floor'."),
        ("mats", "iterations", 0, "iterations is 0; it must be a finite number, 1 or more."),
        ("mats", "iterations", 1.5, "iterations: expected a whole number, got 1.5."),
        ("mats", "tolerance", float("nan"), "tolerance is nan;"),
    ],
)  # fmt: skip
def test_impossible_parameters(tmp_path, method, key, value, words):
    kind = {"regmean": "gram", "mats": "kfac"}[method]
    pair = [make_described(tmp_path / n, "llama", kind, seed=i) for i, n in enumerate("ab")]
    message = problem(recipe(pair, method, parameters={key: value}), tmp_path / "out")
    assert words in message


def test_everything_at_once(pair, tmp_path):
    shutil.rmtree(pair[0].folder / "sidecar")
    pair[1].stored[f"{O}.inputs"][0, 1] += 1e3
    pair[1].write()
    content = recipe(pair, lambdas=[1, -1], parameters={"offdiagonal": 2, "others": "all"})
    messages = problems(content, tmp_path / "out")
    for words in ("lambda of", "offdiagonal is 2.0", "expected 'mean'", "no sidecar", "symmetric"):
        assert sum(words in message for message in messages) == 1, words
    assert len(messages) == 5


def test_experts_in_files_of_different_layouts(tmp_path):
    """One model's files hold each expert for itself, the other's (a merge) hold them packed."""
    a, b = (make_described(tmp_path / n, "mixtral", seed=i) for i, n in enumerate("ab"))
    linear = recipe_of(b.folder, method="linear")
    linear["models"][0]["parameters"] = {"weight": 1.0}
    thetas = merged(linear, tmp_path / "packed")
    packed = Described(tmp_path / "packed", "gram", thetas, {}, {})
    for name in (n for n in thetas if ".experts." in n):
        packed.factors[name] = FactorNames(inputs=f"{name}.inputs")
        experts, _, inputs = thetas[name].shape
        packed.stored[f"{name}.inputs"] = torch.eye(inputs).expand(experts, -1, -1).contiguous()
    packed.write()
    for name in [n for n in a.factors if "experts" not in n]:
        a.stored.pop(a.factors.pop(name).inputs, None)
    a.write()
    message = problem(recipe([a, packed]), tmp_path / "out")
    assert message.startswith("transformers converts model.layers.0.mlp.experts.")
    assert f" and 3 more of {a.folder} while loading, and the models' files hold" in message
    assert "Save the models again with one version of transformers" in message
    content = recipe([a, packed], base_model=str(a.folder), parameters={"exclude": "experts"})
    assert merged(content, tmp_path / "out")
