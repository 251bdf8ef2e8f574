"""Layers that change places: every tensor of the output is computed by hand from its sources."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers
import yaml
from factors import factors_of, make_described, mean, merged_matrix, scale
from models import make_measured, make_model, random_fishers, read, rewrite, write_fishers
from precomputing import fisher_of, refuse, succeed
from running import assert_close, merged, recipe_of
from slicing import at_layer, by_hand, piece, plan_of, sliced

from fisher_mergekit.errors import PlanningError
from fisher_mergekit.sidecar.reader import Sidecar, read_header

METHODS = {"gram": "regmean", "kfac": "mats"}


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Return two measured models of six layers: folders, weights, Fishers."""
    place = tmp_path_factory.mktemp("deep")
    a = make_measured(place / "a", "llama", seed=1, num_hidden_layers=6)
    b = make_measured(place / "b", "llama", seed=2, num_hidden_layers=6, scale=1e-9)
    return list(zip(a, b, strict=True))


LAYERS = [
    [(0, 0, 1)],
    [(0, 1, 1)],
    [(0, 3, 0.4), (1, 5, 0.6)],
    [(0, 3, 0.4), (1, 5, 0.6)],
    [(0, 1, 1), (1, 2, 3)],
    [(0, 2, 2), (1, 3, 3)],
    [(0, 3, 3), (1, 4, 3)],
    [(1, 5, 1)],
]
"""A frankenmerge: layers of one model; layer 3 of A with layer 5 of B, twice; a gradient; B's."""


def frankenmerge(a, b, **top):
    both = piece((a, 3, 4, 0.4), (b, 5, 6, 0.6))
    return sliced(
        piece((a, 0, 2, 1)),
        both,
        both,
        piece((a, 1, 4, [1, 3]), (b, 2, 5, 3)),
        piece((b, 5, 6, 1)),
        **top,
    )


def test_a_frankenmerge_by_fishers(deep, tmp_path):
    (a, b), thetas, fishers = deep
    plan = plan_of(thetas[0], LAYERS, before=[(0, 1)], after=[(1, 1)])
    found = merged(frankenmerge(a, b), tmp_path / "out")
    assert_close(found, by_hand(plan, thetas, fishers))
    for layer, theta in ((0, thetas[0]), (1, thetas[0]), (7, thetas[1])):  # of one model
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        assert torch.equal(found[name], theta[at_layer(name, 5 if layer == 7 else layer)])
    one, two = (f"model.layers.{i}.mlp.up_proj.weight" for i in (2, 3))
    assert torch.equal(found[one], found[two])
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert len(model.model.layers) == 8
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_a_slice_keeps_what_is_excluded_as_its_own_base_model_has_it(deep, tmp_path):
    (a, b), thetas, _ = deep
    recipe = sliced(
        piece((a, 0, 1, 1), (b, 0, 1, 1)),
        piece((a, 1, 2, 1), (b, 1, 2, 1), base_model=str(b)),
        base_model=str(a),
        parameters={"exclude": ["input_layernorm"]},
    )
    found = merged(recipe, tmp_path / "out", write_model_card=True)
    card = (tmp_path / "out" / "README.md").read_text()
    for layer, (base, theta) in enumerate(((a, thetas[0]), (b, thetas[1]))):
        name = f"model.layers.{layer}.input_layernorm.weight"
        assert torch.equal(found[name], theta[name])
        assert f"* Not merged, but taken from `{base}`: `{name}`.\n" in card


@pytest.mark.parametrize("kind", ["gram", "kfac"])
def test_a_frankenmerge_by_factors(tmp_path, kind):
    """The factor that q, k and v share is their source layer's, in each model."""
    made = [
        make_described(tmp_path / n, "llama", kind, seed=s, scale=x, num_hidden_layers=6)
        for n, s, x in (("a", 1, 1.0), ("b", 2, 30.0))
    ]
    parameters = {"tolerance": 1e-10} if kind == "kfac" else {}
    recipe = frankenmerge(*(m.folder for m in made), method=METHODS[kind], parameters=parameters)
    found = merged(recipe, tmp_path / "out")
    plan = plan_of(made[0].thetas, LAYERS, before=[(0, 1)], after=[(1, 1)])
    scales = None
    matrices = factors_of(kind, made[0].thetas)
    if kind == "kfac":
        weighed = [parts for parts in plan.values() if len(parts) > 1]
        used = [{n for ps in weighed for m, n, _ in ps if m == i and n in matrices} for i in (0, 1)]
        scales = [scale(made[i], sorted(names)) for i, names in enumerate(used)]
    expected = {}
    for name, parts in plan.items():
        if len(parts) == 1:
            model, source, _ = parts[0]
            expected[name] = made[model].thetas[source]
        elif parts[0][1] in matrices:
            expected[name] = merged_matrix([(made[m], n, lam) for m, n, lam in parts], scales)
        else:
            expected[name] = mean([made[m].thetas[n] for m, n, _ in parts], [x for *_, x in parts])
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_three_models_and_lambdas_of_each_slice(deep, tmp_path):
    """Lambda of the slice, of the model in it, and of a filter, which asks the source's name."""
    (a, b), thetas, fishers = deep
    c, theta_c, fisher_c = make_measured(tmp_path / "c", "llama", seed=3, num_hidden_layers=3)
    rule = [{"filter": "layers.2.self_attn", "value": 7}, {"value": 2}]
    first = piece((a, 4, 5, 0.5), (b, 0, 1, 1.5), (c, 2, 3, rule))
    second = {
        "sources": [
            {"model": str(b), "layer_range": [1, 3]},
            {"model": str(c), "layer_range": [0, 2], "parameters": {"lambda": 5}},
        ],
        "parameters": {"lambda": 0.25},
    }
    found = merged(sliced(first, second, piece((c, 1, 2, 1))), tmp_path / "out")
    thetas, fishers = [*thetas, theta_c], [*fishers, fisher_c]
    layers = [
        [(0, 4, 0.5), (1, 0, 1.5), (2, 2, 2)],
        [(1, 1, 0.25), (2, 0, 5)],
        [(1, 2, 0.25), (2, 1, 5)],
        [(2, 1, 1)],
    ]
    outer = [(0, 0.5), (1, 1.5), (2, 2)]
    plan = plan_of(thetas[0], layers, before=outer, after=[(2, 1)])
    for name in (n for n in plan if "layers.0.self_attn" in n):
        (one, two, (m, source, _)) = plan[name]
        plan[name] = [one, two, (m, source, 7)]
    assert_close(found, by_hand(plan, thetas, fishers))


def test_lambda_gradients_run_over_the_slice(deep, tmp_path):
    """From 0, where nothing of A is left, to 1, in four layers."""
    (a, b), thetas, fishers = deep
    recipe = sliced(piece((a, 0, 4, [0, 1]), (b, 2, 6, [1, 0.5, 0])))
    found = merged(recipe, tmp_path / "out")
    lambdas = [(0, 1), (1 / 3, 2 / 3), (2 / 3, 1 / 3), (1, 0)]
    layers = [[(0, i, x), (1, i + 2, y)] for i, (x, y) in enumerate(lambdas)]
    # Outside the layers a gradient has its first value, as everywhere in mergekit.
    outer = [(0, 0), (1, 1)]
    plan = plan_of(thetas[0], layers, before=outer, after=outer)
    expected = by_hand(plan, thetas, fishers)
    assert_close(found, expected)
    name = "model.layers.3.mlp.up_proj.weight"
    assert torch.equal(found[name], thetas[0][name])


@pytest.mark.parametrize("clone", [False, True])
def test_repeated_layers_of_one_model(deep, tmp_path, clone):
    """As passthrough does it; what is alike is written twice."""
    (a, _), (theta, _), _ = deep
    layer = piece((a, 2, 3, 1))
    found = merged(sliced(layer, layer, layer), tmp_path / "out", clone_tensors=clone)
    for name in theta:
        if ".layers.2." in name:
            for layer in range(3):
                assert torch.equal(found[at_layer(name, layer)], theta[name])
    assert len(found) == 3 * 9 + 3


def test_two_layers_of_one_model(deep, tmp_path):
    """Under one name mergekit cannot tell them apart."""
    (a, _), (theta, _), (fisher, _) = deep
    both = piece((a, 1, 2, 1), (a, 4, 5, 3))
    with pytest.raises(PlanningError) as info:
        merged(sliced(both), tmp_path / "refused")
    (problem,) = info.value.problems
    assert f"spell its folder in two ways: {a} and {a}/." in problem
    both["sources"][1]["model"] = f"{a}/"
    found = merged(sliced(both), tmp_path / "out")
    layers = [[(0, 1, 1), (1, 4, 3)]]
    outer = [(0, 1), (1, 3)]
    plan = plan_of(theta, layers, before=outer, after=outer)
    assert_close(found, by_hand(plan, [theta] * 2, [fisher] * 2))


@pytest.mark.parametrize(
    ("ranges", "told"),
    [
        ([(2, 0), (2, 0)], ["layer_range [2, 0] of"] * 2),
        ([(-1, 1), (0, 2)], ["layer_range [-1, 1] of"]),
        ([(1, 1), (2, 2)], ["the slices make no layer at all"]),
    ],
)
def test_ranges_that_are_none(deep, tmp_path, ranges, told):
    """mergekit would write a model without layers, or look for layer -1."""
    parts = [(m, *r, 1) for m, r in zip(deep[0], ranges, strict=True)]
    with pytest.raises(PlanningError) as info:
        merged(sliced(piece(*parts)), tmp_path / "out")
    assert len(info.value.problems) == len(told)
    for problem, start in zip(info.value.problems, told, strict=True):
        assert problem.startswith(start)


def test_a_slice_without_layers_says_whose_embeddings_there_are(deep, tmp_path):
    """As in mergekit, where the first slice gives what comes before the layers."""
    (a, b), thetas, fishers = deep
    found = merged(sliced(piece((b, 0, 0, 1)), piece((a, 0, 1, 1))), tmp_path / "out")
    plan = plan_of(thetas[0], [[(0, 0, 1)]], before=[(1, 1)], after=[(0, 1)])
    assert_close(found, by_hand(plan, thetas, fishers))


def test_a_model_that_is_only_copied_needs_no_sidecar(deep, tmp_path):
    """Nothing that could be measured of it would be used."""
    (a, b), thetas, fishers = deep
    other = make_model(tmp_path / "other", "llama", seed=5, num_hidden_layers=3)
    copied = piece((other, 0, 3, 1))
    weighed = piece((a, 0, 2, 1), (b, 0, 2, 3))
    recipe = sliced(copied, weighed, piece((a, 2, 3, 1)))
    found = merged(recipe, tmp_path / "out", write_model_card=True)
    layers = [*([(2, i, 1)] for i in range(3)), *([(0, i, 1), (1, i, 3)] for i in (0, 1))]
    plan = plan_of(thetas[0], [*layers, [(0, 2, 1)]], before=[(2, 1)], after=[(0, 1)])
    expected = by_hand(plan, [*thetas, read(other)], [*fishers, random_fishers(other, 5)])
    assert_close(found, expected)
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"| `{other}` | 1 | – |" in text
    assert f"* Copied tensors, merged with no other: 28 of `{other}`, 11 of `{a}`.\n" in text
    assert_close(merged(sliced(copied), tmp_path / "copy"), read(other), rtol=0, atol=0)
    weighed["sources"].append(piece((other, 0, 2, 1))["sources"][0])
    with pytest.raises(PlanningError, match=f"{other}: there is no sidecar"):
        merged(recipe, tmp_path / "refused")


def test_what_was_measured_differently_is_compared_where_it_is_merged(deep, tmp_path):
    """`allow_mixed` of one slice holds there, and copies are compared with nothing."""
    (a, _), *_ = deep
    other = make_model(tmp_path / "other", "llama", seed=5, num_hidden_layers=3)
    write_fishers(other, random_fishers(other, 5), estimator="empirical")
    slices = [piece((a, 0, 1, 1), (other, 0, 1, 1)), piece((other, 1, 3, 1)), piece((a, 1, 2, 1))]
    with pytest.raises(PlanningError, match="measured with different estimator"):
        merged(sliced(*slices), tmp_path / "refused")
    slices[0]["parameters"] = {"allow_mixed": True}
    assert merged(sliced(*slices), tmp_path / "out")
    third = make_model(tmp_path / "third", "llama", seed=6, num_hidden_layers=3)
    write_fishers(third, random_fishers(third, 6), estimator="empirical")
    alike = [piece((x, 0, 1, 1), (y, 0, 1, 1)) for x, y in (deep[0], (other, third))]
    assert merged(sliced(*alike), tmp_path / "alike")
    slices.append(piece((a, 5, 6, 1), (other, 2, 3, 1)))
    with pytest.raises(PlanningError, match="measured with different estimator"):
        merged(sliced(*slices), tmp_path / "refused")


def test_what_a_scale_is_taken_of_is_checked(tmp_path):
    """Also where a lambda of 0 leaves one model, whose tensor is copied."""
    folders = [make_measured(tmp_path / n, "llama", seed=s)[0] for s, n in enumerate("ab")]
    layer = [{"filter": "layers.0.", "value": 0}, {"value": 1}]
    recipe = recipe_of(*folders, lambdas=[1, layer])
    assert merged(recipe, tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(folders[0], {**read(folders[0]), name: read(folders[0])[name] + 1})
    with pytest.raises(PlanningError, match=f"other weights .digest of {name} differs"):
        merged(recipe, tmp_path / "refused")


@pytest.mark.parametrize("method", ["regmean", "mats"])
def test_a_copied_model_needs_no_factors(tmp_path, method):
    other = make_model(tmp_path / "other", "llama", seed=5)
    recipe = sliced(piece((other, 0, 2, 1)), method=method, parameters={"others": "fisher"})
    found = merged(recipe, tmp_path / "out")
    assert_close(found, read(other), rtol=0, atol=0)


def test_others_are_asked_for_where_something_is_merged(tmp_path):
    made = [make_described(tmp_path / n, "llama", seed=s) for s, n in enumerate("ab")]
    folders = [m.folder for m in made]
    parts = [piece((folders[0], 0, 1, 1)), piece(*((f, 1, 2, 1) for f in folders))]
    parts[0]["parameters"] = {"others": "fisher"}
    assert merged(sliced(*parts, method="regmean"), tmp_path / "out")
    parts[1]["parameters"] = {"others": "fisher"}
    with pytest.raises(PlanningError, match="has no complete 'fisher'"):
        merged(sliced(*parts, method="regmean"), tmp_path / "refused")


class TestMeasured:
    """`precompute` reads sliced recipes too, and measures each of their models once."""

    @pytest.fixture
    def pair(self, tmp_path):
        return [tiny.save_model(tmp_path / n, "llama", seed=i) for i, n in enumerate("ab")]

    @pytest.fixture
    def calibration(self, tmp_path):
        return {"path": str(tiny.write_rows(tmp_path / "data.jsonl")), "text": "text"}

    @staticmethod
    def write(tmp_path, recipe):
        path = tmp_path / "recipe.yml"
        path.write_text(yaml.safe_dump(recipe))
        return path

    def test_and_merged(self, pair, calibration, tmp_path):
        """What stands in one slice holds in all; the rest is the recipe's."""
        a, b = pair
        recipe = sliced(
            piece((a, 1, 2, 0.4), (b, 0, 1, 0.6)), piece((b, 1, 2, 1)), calibration=calibration
        )
        recipe["slices"][1]["sources"][0]["calibration"] = {"examples": 5}
        with pytest.raises(PlanningError) as info:
            merged(recipe, tmp_path / "refused")
        assert all(
            p.endswith("Run: mergekit-fisher precompute RECIPE") for p in info.value.problems
        )
        assert "Measured 2 of 2 models" in succeed(self.write(tmp_path, recipe))
        assert Sidecar(a / "sidecar", "fisher").measurement.settings.examples == 7
        assert Sidecar(b / "sidecar", "fisher").measurement.settings.examples == 5
        found = merged(recipe, tmp_path / "out")
        thetas, fishers = [read(a), read(b)], [fisher_of(a), fisher_of(b)]
        layers = [[(0, 1, 0.4), (1, 0, 0.6)], [(1, 1, 1)]]
        plan = plan_of(thetas[0], layers, before=[(0, 0.4), (1, 0.6)], after=[(1, 1)])
        assert_close(found, by_hand(plan, thetas, fishers))

    def test_modules_and_what_a_slice_asks_for(self, pair, calibration, tmp_path):
        """The kind that one slice alone needs is measured too, where the recipe says."""
        a, b = pair
        part = piece((a, 0, 2, 1), (b, 0, 2, 1), parameters={"others": "fisher"})
        part["sources"][1]["parameters"]["sidecar"] = str(tmp_path / "elsewhere")
        recipe = {
            "merge_method": "regmean", "dtype": "float32", "calibration": calibration,
            "modules": {"default": {"slices": [part]}},
        }  # fmt: skip
        succeed(self.write(tmp_path, recipe))
        for place in (a / "sidecar", tmp_path / "elsewhere"):
            assert set(read_header(place).kinds) == {"gram", "fisher"}
        merged(recipe, tmp_path / "out")

    def test_what_is_only_copied_is_not_measured(self, pair, calibration, tmp_path):
        """Not even data is asked for; that of a prior is merged with the base."""
        a, b = pair
        other = tiny.save_model(tmp_path / "other", "llama", seed=3)
        slices = [piece((other, 0, 1, 1)), piece((a, 0, 1, 1), (b, 1, 2, 1))]
        for source in slices[1]["sources"]:
            source["calibration"] = calibration
        recipe = self.write(tmp_path, sliced(*slices))
        said = succeed(recipe)
        assert f"{other} is only copied, nothing to measure." in said
        assert "Measured 2 of 2 models" in said
        assert merged(sliced(*slices), tmp_path / "out")
        assert "Measured 0 of 0 models" in succeed(self.write(tmp_path, sliced(slices[0])))
        slices[0]["sources"][0]["calibration"] = calibration
        recipe = self.write(tmp_path, sliced(slices[0]))
        assert "Measured 1 of 1 models" in succeed(recipe, "--model", other)
        top = {"base_model": str(a), "parameters": {"prior": True}, "calibration": calibration}
        recipe = self.write(tmp_path, sliced(slices[0], **top))
        assert "Measured 0 of 2 models" in succeed(recipe)
        slices[0]["parameters"] = {"prior": {"filter": "mlp", "value": False}}
        assert "only copied, nothing" not in succeed(self.write(tmp_path, sliced(*slices, **top)))
        slices[0]["parameters"] = {"prior": False}
        assert f"{other} is only copied" in succeed(self.write(tmp_path, sliced(*slices, **top)))
        top["base_model"] = str(other)  # which is the prior, too
        assert "only copied, nothing" not in succeed(self.write(tmp_path, sliced(*slices, **top)))

    def test_two_ways_of_measuring_one_model(self, pair, calibration, tmp_path):
        a, _ = pair
        recipe = sliced(piece((a, 0, 1, 1)), piece((a, 1, 2, 1)), calibration=calibration)
        for part, examples in zip(recipe["slices"], (3, 4), strict=True):
            part["sources"][0]["calibration"] = {"examples": examples}
        said = refuse(self.write(tmp_path, recipe))
        assert f"calibration of {a} is {{'examples': 3}} in one place, and" in said
        assert "a model is measured once." in said
