"""`merge_method: fisher` with base_model's own Fisher as a prior."""

import shutil

import merge_oracle
import pytest
import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from models import make_measured, make_model, random_fishers, read, rewrite, write_fishers
from running import assert_close, merged, mergekit_yaml, recipe_of

from fisher_mergekit.errors import PlanningError

pytestmark = pytest.mark.slow  # exhaustive: not needed at every change

FLOOR = 1e-6


@pytest.fixture
def family(tmp_path):
    """Return a base and two models: folders, weights, Fishers; the base is last."""
    models = [
        make_measured(tmp_path / name, "llama", seed=seed, scale=scale)
        for name, seed, scale in (("a", 1, 1.0), ("b", 2, 1e-9), ("base", 3, 1e4))
    ]
    return list(zip(*models, strict=True))


def recipe(family, *, lambdas=(0.7, 0.9), **more):
    (a, b, base), *_ = family
    parameters = {"prior": True, **more.pop("parameters", {})}
    return recipe_of(a, b, lambdas=lambdas, base_model=str(base), parameters=parameters, **more)


def by_hand(family, lambdas=(0.7, 0.9), *, names=None, floor=FLOOR):
    """θ₀ + (F₀ + Σ λ F)⁻¹ Σ λ (F₀ + F) (θ − θ₀), of Fishers over their scales."""
    _, thetas, fishers = family
    names = list(thetas[0]) if names is None else names
    scales = [merge_oracle.scale(f, names) for f in fishers]
    result = {}
    for name in names:
        *own, prior = (f[name].double() / s for f, s in zip(fishers, scales, strict=True))
        prior = prior + floor
        *models, base = (theta[name].double() for theta in thetas)
        total = prior + sum(lam * f for lam, f in zip(lambdas, own, strict=True))
        moved = sum(
            lam * (prior + f) * (theta - base)
            for lam, f, theta in zip(lambdas, own, models, strict=True)
        )
        result[name] = base + moved / total
    return result


@pytest.mark.slow
def test_by_the_command(family, tmp_path):
    process, out = mergekit_yaml(recipe(family), tmp_path)
    assert process.returncode == 0, process.stderr
    assert_close(read(out), by_hand(family))


def test_lambdas_are_absolute(family, tmp_path):
    for lambdas in ((0.1, 0.2), (1.0, 2.0)):
        out = tmp_path / str(lambdas[0])
        assert_close(
            merged(recipe(family, lambdas=lambdas), out), by_hand(family, lambdas),
            rtol=1e-4, atol=1e-4,
        )  # fmt: skip


def test_one_model_with_lambda_one_comes_back(family, tmp_path):
    (a, _, base), (theta, *_), _ = family
    content = recipe_of(a, lambdas=[1.0], base_model=str(base), parameters={"prior": True})
    found = merged(content, tmp_path / "out")
    assert all(torch.equal(found[name], theta[name]) for name in theta)


def test_lambda_zero_removes_a_model_and_does_not_read_it(family, tmp_path):
    (a, b, base), (theta_a, theta_b, theta), (fisher_a, _, fisher) = family
    rewrite(b, {n: t * torch.nan for n, t in theta_b.items()})
    found = merged(recipe(family, lambdas=(0.5, 0)), tmp_path / "out")
    alone = [(a, base), (theta_a, theta), (fisher_a, fisher)]
    assert_close(found, by_hand(alone, (0.5,)))


def test_the_prior_s_own_sidecar(family, tmp_path):
    """Measured on other data than the model of the same weights that is merged too."""
    (a, b, base), (theta_a, theta_b, theta), (fisher_a, fisher_b, _) = family
    place = tmp_path / "prior"
    fishers = random_fishers(base, 77)
    write_fishers(base, fishers, out=place)
    content = recipe(family, parameters={"prior_sidecar": str(place)})
    expected = [(a, b, base), (theta_a, theta_b, theta), (fisher_a, fisher_b, fishers)]
    assert_close(merged(content, tmp_path / "1"), by_hand(expected))
    content["models"].append({"model": str(base), "parameters": {"lambda": 0.4}})
    _, thetas, (*own, _) = family
    both = [None, [*thetas, theta], [*own, family[2][2], fishers]]
    assert_close(merged(content, tmp_path / "2"), by_hand(both, (0.7, 0.9, 0.4)))


def test_not_normalized_a_much_larger_prior_gives_task_arithmetic(family, tmp_path):
    found = merged(recipe(family, parameters={"normalize_fishers": False}), tmp_path / "out")
    _, (a, b, base), (fisher_a, _, fisher) = family
    for name in base:
        expected = base[name] + 0.7 * (a[name] - base[name]) + 0.9 * (b[name] - base[name])
        sure = fisher[name] > 1e5 * fisher_a[name]
        torch.testing.assert_close(found[name][sure], expected[sure], rtol=1e-3, atol=1e-3)
    assert sure.any()


def test_without_it_for_some_tensors(family, tmp_path):
    """And their Fishers belong to the scale all the same."""
    rule = [{"filter": "mlp", "value": False}, {"value": True}]
    found = merged(recipe(family, parameters={"prior": rule}), tmp_path / "out")
    _, thetas, fishers = family
    names = [n for n in thetas[0] if "mlp" in n]
    scales = [merge_oracle.scale(f, list(f)) for f in fishers]
    for name in names:
        expected = merge_oracle.merge_tensor(
            [t[name] for t in thetas[:2]], [f[name] for f in fishers[:2]], [0.7, 0.9], scales[:2]
        )
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found["lm_head.weight"].double(), by_hand(family)["lm_head.weight"])


def test_floats_that_are_no_parameters_are_added_by_task_arithmetic(family, tmp_path):
    (folders, thetas, fishers), name = family, "model.norm.weight"
    for folder, values in zip(folders, fishers, strict=True):
        del values[name]
        write_fishers(folder, values, unmeasured={name: "a buffer"})
    found = merged(recipe(family), tmp_path / "out")[name]
    a, b, base = (theta[name] for theta in thetas)
    torch.testing.assert_close(found, base + 0.7 * (a - base) + 0.9 * (b - base))


def test_layers_that_change_places(family, tmp_path):
    """The base's layer is the one that the models' layer began as."""
    (a, b, _), thetas, _ = family

    def piece(layer):
        sources = [
            {"model": str(m), "layer_range": [layer, layer + 1], "parameters": {"lambda": lam}}
            for m, lam in ((a, 0.7), (b, 0.9))
        ]
        return {"sources": sources}

    content = recipe(family)
    del content["models"]
    # The first slice also merges what comes before the layers, the last what comes after them.
    found = merged({**content, "slices": [piece(1), piece(0)]}, tmp_path / "out")
    expected = by_hand(family)
    for name in (n for n in thetas[0] if ".layers.0." in n):
        other = name.replace(".layers.0.", ".layers.1.")
        pairs = {name: expected[other], other: expected[name]}
        assert_close({n: found[n] for n in pairs}, pairs)


@pytest.mark.parametrize(("lambdas", "warns"), [((70, 30), True), ((1, 1.5), False)])
def test_lambdas_that_were_meant_as_shares_are_told_of(family, tmp_path, caplog, lambdas, warns):
    found = merged(recipe(family, lambdas=lambdas), tmp_path / "out")
    assert_close(found, by_hand(family, lambdas), rtol=1e-3, atol=1e-3)
    told = [r.getMessage() for r in caplog.records if "lambdas are absolute" in r.getMessage()]
    assert len(told) == warns
    assert not warns or "They sum to 100 here" in told[0]


class TestRefusals:
    def problems(self, content, out):
        with pytest.raises(PlanningError) as info:
            run_merge(
                MergeConfiguration.model_validate(content), str(out), MergeOptions(quiet=True)
            )
        assert not out.exists()
        return info.value.problems

    def problem(self, content, out):
        (message,) = self.problems(content, out)
        return message

    def test_no_base_model(self, family, tmp_path):
        content = recipe(family)
        del content["base_model"]
        message = self.problem(content, tmp_path / "out")
        assert message.endswith(
            "Add `base_model:` at the top, with the model that all were trained from."
        )

    def test_no_sidecar(self, family, tmp_path):
        base = family[0][2]
        shutil.rmtree(base / "sidecar")
        message = self.problem(recipe(family), tmp_path / "out")
        assert message == (
            f"{base}: there is no sidecar at {base / 'sidecar'}. Run: mergekit-fisher precompute "
            "RECIPE"
        )
        content = recipe(family, parameters={"prior_sidecar": "elsewhere"})
        message = self.problem(content, tmp_path / "out")
        assert "no sidecar at elsewhere. Run: mergekit-fisher precompute RECIPE" in message
        content["models"].append({"model": str(base)})  # measured with the recipe, but elsewhere
        message = self.problems(content, tmp_path / "out")[-1]
        assert f"no sidecar at elsewhere. Run: mergekit-fisher precompute --model {base}" in message
        assert "--out elsewhere" in message

    def test_a_sidecar_of_other_weights(self, family, tmp_path):
        content = recipe(family, parameters={"prior_sidecar": str(family[0][0] / "sidecar")})
        message = self.problem(content, tmp_path / "out")
        assert message.startswith(f"{family[0][2]}: the sidecar {family[0][0] / 'sidecar'} was mea")

    def test_measured_differently(self, family, tmp_path):
        base = family[0][2]
        write_fishers(base, family[2][2], estimator="empirical")
        message = self.problem(recipe(family), tmp_path / "out")
        assert f"empirical for {base} (the prior)." in message
        assert merged(recipe(family, parameters={"allow_mixed": True}), tmp_path / "out")

    def test_favor_base_too(self, family, tmp_path):
        content = recipe(family, parameters={"favor_base": True})
        content["models"].append({"model": content["base_model"], "parameters": {"lambda": 1}})
        assert "Keep one of the two." in self.problem(content, tmp_path / "out")

    def test_a_sidecar_without_a_prior(self, family, tmp_path):
        content = recipe(family, parameters={"prior": False, "prior_sidecar": "x"})
        assert "has no effect without `prior: true`" in self.problem(content, tmp_path / "out")

    def test_a_sidecar_of_a_slice(self, family, tmp_path):
        content = recipe(family)
        del content["models"]
        sources = [{"model": str(family[0][0]), "layer_range": [0, 2]}]
        content["slices"] = [{"sources": sources, "parameters": {"prior_sidecar": "x"}}]
        message = self.problem(content, tmp_path / "out")
        assert message.endswith("'prior_sidecar' belongs under the recipe's own parameters.")

    def test_layers_of_different_places(self, family, tmp_path):
        a, b, _ = family[0]
        content = recipe(family)
        del content["models"]
        sources = [{"model": str(m), "layer_range": [i, i + 1]} for i, m in enumerate((a, b))]
        content["slices"] = [{"sources": sources}]
        (message,) = self.problems(content, tmp_path / "out")
        assert "which did not begin as one tensor of base_model" in message
        assert "nor for 8 more. Switch it off" in message
        # Beside a slice that has one, by the line that the message gives.
        content["slices"][0]["parameters"] = {"prior": False}
        content["slices"].append({"sources": [{"model": str(b), "layer_range": [1, 2]}]})
        assert merged(content, tmp_path / "out")

    def test_a_head_that_the_base_lacks(self, tmp_path):
        a, b, base = folders = [tmp_path / name for name in ("a", "b", "base")]
        for seed, folder in enumerate(folders):
            make_model(folder, seed=seed)
            if folder == base:
                rewrite(base, {n: t for n, t in read(base).items() if "classifier" not in n})
            write_fishers(folder, random_fishers(folder, seed))
        content = recipe_of(a, b, base_model=str(base), parameters={"prior": True})
        message = self.problem(content, tmp_path / "out")
        assert message.startswith(f"base_model {base} lacks classifier.bias and 1 more, so there")
        rule = (
            "`prior: [{filter: classifier.bias, value: false}, {filter: classifier.weight, value: "
            "false}, {value: true}]`"
        )
        assert message.endswith(rule)
        content["parameters"]["prior"] = [{"filter": "classifier", "value": False}, {"value": True}]
        assert merged(content, tmp_path / "out")
