"""Packed experts under `regmean` and `mats`: each has factors of its own."""

import shutil

import dense_oracle
import pytest
import torch
import transformers
from factors import Described, make_described, merged_model, random_factor
from models import FAMILIES, read, rewrite
from running import merged, recipe_of

from fisher_mergekit.sidecar.header import FactorNames


def packed(folder, kind, seed):
    """Return a model whose files hold its experts packed, as a merge's do, and their factors."""
    made = make_described(folder / "unpacked", "mixtral", seed=seed)
    linear = recipe_of(made.folder, method="linear")
    linear["models"][0]["parameters"] = {"weight": 1.0}
    thetas = merged(linear, folder / "packed")
    generator = torch.Generator().manual_seed(seed)
    result = Described(folder / "packed", kind, read(folder / "packed"), {}, {})
    for name in (n for n in thetas if ".experts." in n):
        experts, outputs, inputs = thetas[name].shape
        roles = {"inputs": inputs} | ({"outputs": outputs} if kind == "kfac" else {})
        for role, width in roles.items():
            factors = [random_factor(generator, width, 30) for _ in range(experts)]
            factors[1] *= seed  # no token of the first model was sent to this one
            result.stored[f"{name}.{role}"] = torch.stack(factors)
        result.factors[name] = FactorNames(
            inputs=f"{name}.inputs", outputs=f"{name}.outputs" if kind == "kfac" else None
        )
    result.write()
    return result


@pytest.mark.parametrize(("kind", "method"), [("gram", "regmean"), ("kfac", "mats")])
def test_every_expert_has_its_own_factors(tmp_path, kind, method):
    first, second = models = [packed(tmp_path / n, kind, seed) for seed, n in enumerate("ab")]
    parameters = {} if kind == "gram" else {"tolerance": 1e-10, "normalize_fishers": False}
    folders = [made.folder for made in models]
    recipe = recipe_of(*folders, method=method, lambdas=[1, 2], parameters=parameters)
    found = merged(recipe, tmp_path / "out")
    assert len(first.factors) == 4
    for name in first.factors:
        torch.testing.assert_close(found[name][1], second.thetas[name][1], rtol=1e-4, atol=1e-4)
        matrices = [
            getattr(dense_oracle, kind)(
                made.thetas[name][0].shape, [x[0] for x in made.precision(name)], lam
            )
            for made, lam in zip(models, [1, 2], strict=True)
        ]
        expected = dense_oracle.solution(matrices, [made.thetas[name][0] for made in models])
        torch.testing.assert_close(found[name][0].double(), expected, rtol=1e-4, atol=1e-4)


def parameters(folder, family):
    """Return what transformers loads, of which nothing may be drawn at random."""
    model, info = getattr(transformers, FAMILIES[family][0]).from_pretrained(
        folder, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    return dict(model.named_parameters())


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("mixtral", {"num_local_experts": 12}),
        pytest.param("qwen3_moe", {"num_experts": 12}, marks=pytest.mark.slow),
        pytest.param("olmoe", {}, marks=pytest.mark.slow),
        pytest.param("llava", {}, marks=pytest.mark.slow),
        pytest.param("qwen2_vl", {}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(("kind", "method"), [("gram", "regmean"), ("kfac", "mats")])
def test_what_is_put_together_while_loading_is_merged_in_the_files_layout(
    tmp_path, family, config, kind, method
):
    """Merged by hand tensor by tensor in the files, and loaded as transformers loads those."""
    models = [
        make_described(tmp_path / name, family, kind, seed=seed, **config)
        for seed, name in enumerate("ab")
    ]
    first = models[0]
    assert set(first.thetas) - set(parameters(first.folder, family)), "nothing is converted"
    options = {} if kind == "gram" else {"tolerance": 1e-10}
    folders = [made.folder for made in models]
    recipe = recipe_of(*folders, method=method, lambdas=[0.7, 0.3], parameters=options)
    merged(recipe, tmp_path / "out")
    by_hand = tmp_path / "by-hand"
    shutil.copytree(first.folder, by_hand, ignore=shutil.ignore_patterns("sidecar"))
    expected = merged_model(models, [0.7, 0.3])
    rewrite(by_hand, {name: tensor.float() for name, tensor in expected.items()})
    found = parameters(tmp_path / "out", family)
    for name, parameter in parameters(by_hand, family).items():
        torch.testing.assert_close(
            found[name], parameter, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
