"""`regmean` and `mats` by mergekit's own command, against the equation written down whole."""

import dense_oracle
import merge_oracle
import pytest
import torch
import transformers
from factors import make_described, mean, merged_matrix, merged_model
from models import make_measured, random_fishers, read, write_fishers
from running import assert_close, merged, mergekit_yaml, planned, recipe_of, scheduled

from fisher_mergekit.merging.loading import Together
from fisher_mergekit.merging.tasks import SharedTask
from fisher_mergekit.precision import gram, kfac

METHODS = {"gram": "regmean", "kfac": "mats"}
both_kinds = pytest.mark.parametrize("kind", list(METHODS))


def pair_of(place, family="llama", kind="gram", **options):
    """Return two described models, of which the second is surer of everything."""
    return [
        make_described(place / name, family, kind, seed=seed, scale=scale, **options)
        for name, seed, scale in (("a", 1, 1.0), ("b", 2, 30.0))
    ]


def recipe(models, **top):
    parameters = top.pop("parameters", {})
    if models[0].kind == "kfac":
        parameters = {"tolerance": 1e-10, **parameters}
    return recipe_of(
        *(made.folder for made in models),
        method=METHODS[models[0].kind],
        parameters=parameters,
        **top,
    )


def check(found, expected, **tolerance):
    assert_close(found, expected, **(tolerance or {"rtol": 1e-4, "atol": 1e-4}))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gram", "kfac"])
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_by_the_command(tmp_path, kind, family):
    """Heads of different size, shared inputs, and transposed layers with a tied head."""
    classifies = family == "bert"
    models = [
        make_described(
            tmp_path / name, family, kind, seed=seed, scale=scale,
            **({"num_labels": seed + 1} if classifies else {}),
        )
        for name, seed, scale in (("a", 1, 1.0), ("b", 2, 30.0))
    ]  # fmt: skip
    top = {}
    if classifies:
        top = {"base_model": str(models[0].folder), "parameters": {"exclude": "classifier"}}
    process, out = mergekit_yaml(recipe(models, lambdas=[0.7, 0.3], **top), tmp_path)
    assert process.returncode == 0, process.stderr
    names = [n for n in models[0].thetas if "classifier" not in n]
    expected = {**models[0].thetas, **merged_model(models, [0.7, 0.3], names=names)}
    check(read(out), expected)
    architecture = getattr(
        transformers, transformers.AutoConfig.from_pretrained(out).architectures[0]
    )
    _, info = architecture.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]


@both_kinds
def test_layers_take_their_factors_along(tmp_path, kind):
    """Output layers: A1 with B0, then A0 alone."""
    a, b = models = pair_of(tmp_path, kind=kind)

    def piece(*sources):
        return {
            "sources": [
                {"model": str(m.folder), "layer_range": [i, i + 1], "parameters": {"lambda": lam}}
                for m, i, lam in sources
            ]
        }

    parameters = {"normalize_fishers": False, "tolerance": 1e-10} if kind == "kfac" else {}
    found = merged(
        {
            "merge_method": METHODS[kind],
            "dtype": "float32",
            "parameters": parameters,
            "slices": [piece((a, 1, 0.4), (b, 0, 0.6)), piece((a, 0, 2.0))],
        },
        tmp_path / "out",
    )
    for name in (n for n in a.thetas if ".layers.0." in n):
        one = name.replace(".layers.0.", ".layers.1.")
        expected = mean([a.thetas[one], b.thetas[name]], [0.4, 0.6])
        if name in a.factors:
            expected = merged_matrix([(a, one, 0.4), (b, name, 0.6)])
        check({name: found[name], one: found[one]}, {name: expected, one: a.thetas[name]})
    assert sorted(found) == sorted(models[0].thetas)


@both_kinds
def test_embeddings_by_the_counts_of_their_tokens(tmp_path, kind):
    models = pair_of(tmp_path, kind=kind)
    name = "model.embed_tokens.weight"
    found = merged(recipe(models, parameters={"embeddings": True}), tmp_path / "out")
    expected = merged_model(models, [1, 1], embeddings=True)
    check(found, expected)
    plain = merged(recipe(models), tmp_path / "plain")
    check(plain, merged_model(models, [1, 1]))
    assert not torch.allclose(found[name], plain[name])
    if kind == "gram":
        a, b = (made.stored[f"{name}.inputs"][:, None] for made in models)
        by_rows = (a * models[0].thetas[name] + b * models[1].thetas[name]) / (a + b)
        torch.testing.assert_close(found[name], by_rows, rtol=1e-5, atol=1e-5)


def test_a_word_that_nobody_met_keeps_the_mean(tmp_path):
    models = pair_of(tmp_path)
    name = "model.embed_tokens.weight"
    for made in models:
        made.stored[f"{name}.inputs"][5] = 0
        made.write()
    options = {"embeddings": True}
    found = merged(recipe(models, lambdas=[1, 3], parameters=options), tmp_path / "out")
    expected = mean([made.thetas[name][5] for made in models], [1, 3])
    torch.testing.assert_close(found[name][5].double(), expected, rtol=1e-5, atol=1e-5)


@both_kinds
def test_others_by_their_fisher(tmp_path, kind):
    models = pair_of(tmp_path, kind=kind)
    fishers = [random_fishers(made.folder, seed) for seed, made in enumerate(models)]
    for made, values in zip(models, fishers, strict=True):
        write_fishers(made.folder, values)
        made.write()
    found = merged(recipe(models, lambdas=[1, 2], parameters={"others": "fisher"}), tmp_path / "o")
    first = models[0]
    others = [n for n in first.thetas if n not in first.factors or first.is_embedding(n)]
    thetas = [made.thetas for made in models]
    expected = merged_model(models, [1, 2]) | merge_oracle.merge(thetas, fishers, [1, 2], others)
    check(found, expected)
    assert any("layernorm" in name for name in others)


@both_kinds
@pytest.mark.parametrize("offdiagonal", [0.0, 1.0])
def test_parameters_of_the_methods(tmp_path, kind, offdiagonal):
    """`offdiagonal` of the one; of the other, Fishers as they are, of which the larger wins."""
    models = pair_of(tmp_path, kind=kind)
    if kind == "gram":
        found = merged(recipe(models, parameters={"offdiagonal": offdiagonal}), tmp_path / "out")
        expected = merged_model(models, [1, 1], offdiagonal=offdiagonal)
    else:
        normalize = bool(offdiagonal)
        parameters = {"normalize_fishers": normalize}
        found = merged(recipe(models, parameters=parameters), tmp_path / "out")
        expected = merged_model(models, [1, 1], normalize=normalize)
    check(found, expected)


def test_a_ridge(tmp_path):
    models = pair_of(tmp_path)
    found = merged(recipe(models, parameters={"ridge": 0.5}), tmp_path / "out")
    name = "model.layers.0.mlp.down_proj.weight"
    grams = [dense_oracle.shrunk(*made.precision(name), 0.9) for made in models]
    total = sum(grams)
    ridge = 0.5 * total.diag().mean() * torch.eye(len(total)).double()
    thetas = [made.thetas[name].double() for made in models]
    right = sum(t @ g for t, g in zip(thetas, grams, strict=True)) + mean(thetas, [1, 1]) @ ridge
    expected = torch.linalg.solve(total + ridge, right.mT).mT
    torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-5)


@both_kinds
def test_filters_and_lambda_zero(tmp_path, kind):
    """Where a model does not count, its factors are not asked for."""
    models = pair_of(tmp_path, kind=kind)
    rule = [{"filter": "self_attn.q_proj", "value": 5}, {"filter": "mlp", "value": 0}, {"value": 1}]
    parameters = {"normalize_fishers": False} if kind == "kfac" else {}
    found = merged(recipe(models, lambdas=[1, rule], parameters=parameters), tmp_path / "out")
    for name in models[0].thetas:
        second = 5 if "q_proj" in name else 0 if "mlp" in name else 1
        if second == 0:
            assert torch.equal(found[name], models[0].thetas[name])
        else:
            expected = merged_model(models, [1, second], names=[name], normalize=False)
            check({name: found[name]}, expected)


@both_kinds
def test_equal_models_come_back_and_equal_factors_give_linear(tmp_path, kind):
    a, b = pair_of(tmp_path, kind=kind)
    b.factors, b.stored = a.factors, a.stored
    b.write()
    linear = {n: mean([a.thetas[n], b.thetas[n]], [1, 3]) for n in a.thetas}
    check(merged(recipe([a, b], lambdas=[1, 3]), tmp_path / "1"), linear, rtol=1e-5, atol=1e-5)
    same = make_described(tmp_path / "same", "llama", kind, seed=1, rows=3)
    found = merged(recipe([a, same]), tmp_path / "2")
    assert all(torch.equal(found[name], theta) for name, theta in a.thetas.items())


@both_kinds
def test_few_rows_dead_inputs_and_half_precision(tmp_path, kind):
    """Fewer rows than dimensions, an input that is always zero, a layer that nothing reached."""
    models = pair_of(tmp_path, kind=kind, rows=2)
    for made in models:
        for name, factor in made.stored.items():
            if factor.ndim == 2:
                factor[3] = factor[:, 3] = 0
            if "layers.1.mlp.down_proj" in name:
                factor.zero_()
        made.write()
    found = merged(recipe(models, lambdas=[1, 3], dtype="bfloat16"), tmp_path / "out")
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    assert all(t.isfinite().all() for t in found.values())
    dead = "model.layers.1.mlp.down_proj.weight"
    expected = mean([made.thetas[dead] for made in models], [1, 3])
    torch.testing.assert_close(found[dead], expected.bfloat16())
    if kind == "gram":
        name = "model.layers.0.self_attn.o_proj.weight"
        column = mean([made.thetas[name][:, 3] for made in models], [1, 3])
        torch.testing.assert_close(found[name][:, 3], column.bfloat16())


@both_kinds
def test_shared_inputs_are_loaded_and_factorised_once(tmp_path, kind, monkeypatch):
    """q, k and v get the same inputs, gate and up too; and what they share is soon let go."""
    models = pair_of(tmp_path, kind=kind)
    tasks = scheduled(planned(recipe(models)))
    shared = [task for task in tasks if isinstance(task, SharedTask)]
    assert len(shared) == 2 * 4 + 1  # (qkv, o, gate and up, down) in two layers; the head
    first = next(t for t in shared if "layers.0.self_attn.q_proj" in t.inputs[0].name)
    users = [i for i, t in enumerate(tasks) if first in t.arguments().values()]
    assert len(users) == 3
    between = {getattr(t, "name", "") for t in tasks[tasks.index(first) : users[-1]]}
    assert all("self_attn" in n and "o_proj" not in n for n in between if n), between
    loads = [t.tasks for t in tasks if isinstance(t, Together)]
    (_, _) = (group for group in loads if "q_proj.weight.inputs" in group[0].name)  # two layers

    calls = []
    module = gram if kind == "gram" else kfac
    original = module.common
    monkeypatch.setattr(
        module, "common", lambda inputs, *a, **k: calls.append(inputs) or original(inputs, *a, **k)
    )
    monkeypatch.setattr(module.common, "__wrapped__", original, raising=False)
    merged(recipe(models), tmp_path / "out")
    assert len(calls) == len(shared)


def test_layers_of_other_lambdas_do_not_share(tmp_path):
    models = pair_of(tmp_path)
    rule = [{"filter": "k_proj", "value": 5}, {"value": 1}]
    tasks = scheduled(planned(recipe(models, lambdas=[1, rule])))
    shared = [task for task in tasks if isinstance(task, SharedTask)]
    assert len(shared) == 2 * 5 + 1
    found = merged(recipe(models, lambdas=[1, rule]), tmp_path / "out")
    name = "model.layers.1.self_attn.k_proj.weight"
    check({name: found[name]}, merged_model(models, [1, 5], names=[name]))


def test_models_of_other_methods_keep_their_sidecars(tmp_path):
    """One folder holds all kinds; each method reads its own."""
    a, theta_a, fisher_a = make_measured(tmp_path / "a", "llama", seed=1)
    b, theta_b, fisher_b = make_measured(tmp_path / "b", "llama", seed=2)
    models = pair_of(tmp_path)
    write_fishers(a, fisher_a)
    write_fishers(b, fisher_b)
    expected = merge_oracle.merge([theta_a, theta_b], [fisher_a, fisher_b], [1, 1], list(theta_a))
    assert_close(merged(recipe_of(a, b), tmp_path / "fisher"), expected)
    check(merged(recipe(models), tmp_path / "gram"), merged_model(models, [1, 1]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "flags", [{"cuda": True}, {"cuda": True, "read_to_gpu": True}, {"gpu_rich": True}]
)
@both_kinds
def test_on_a_gpu(tmp_path, kind, flags):
    """What layers share stays on the device that computed it."""
    models = pair_of(tmp_path, kind=kind)
    options = {"embeddings": True}
    found = merged(recipe(models, parameters=options), tmp_path / "out", **flags)
    check(found, merged_model(models, [1, 1], embeddings=True))
