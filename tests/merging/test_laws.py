"""What holds for every merge: laws, on small real models, in this process."""

import itertools

import merge_oracle
import pytest
import torch
import transformers
from models import make_measured, make_model, random_fishers, read, rewrite, write_fishers
from running import assert_close, merged, planned, recipe_of, run_planned, scheduled

from fisher_mergekit.merging import files, sidecars


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Return two measured language models: folders, weights, Fishers."""
    place = tmp_path_factory.mktemp("pair")
    a = make_measured(place / "a", "llama", seed=1)
    b = make_measured(place / "b", "llama", seed=2, scale=1e-12)
    return list(zip(a, b, strict=True))


def oracle(pair, lambdas, **options):
    _, thetas, fishers = pair
    return merge_oracle.merge(thetas, fishers, lambdas, list(thetas[0]), **options)


def test_the_definition(pair, tmp_path):
    assert_close(merged(recipe_of(*pair[0]), tmp_path), oracle(pair, [1, 1]))


def test_scaling_all_lambdas_changes_nothing(pair, tmp_path):
    once = merged(recipe_of(*pair[0], lambdas=[0.25, 0.75]), tmp_path / "1")
    again = merged(recipe_of(*pair[0], lambdas=[1e30, 3e30]), tmp_path / "2")
    assert_close(once, again, rtol=1e-6, atol=1e-6)


def test_order_of_models_changes_nothing(pair, tmp_path):
    there = merged(recipe_of(*pair[0], lambdas=[0.2, 0.8]), tmp_path / "1")
    back = merged(recipe_of(*reversed(pair[0]), lambdas=[0.8, 0.2]), tmp_path / "2")
    assert_close(there, back, rtol=1e-5, atol=1e-6)


def test_equal_models_come_back_unchanged(tmp_path):
    a, theta, _ = make_measured(tmp_path / "a", "llama", seed=1)
    b = make_model(tmp_path / "b", "llama", seed=1)
    write_fishers(b, random_fishers(b, seed=2))
    for name, tensor in merged(recipe_of(a, b), tmp_path / "out").items():
        assert torch.equal(tensor, theta[name]), name


def test_equal_fishers_give_mergekits_linear(pair, tmp_path):
    (a, b), _, (fisher, _) = pair
    other = write_fishers(b, fisher, out=tmp_path / "same")
    recipe = recipe_of(a, b, lambdas=[0.3, 0.9], parameters={"floor": 0})
    recipe["models"][1]["parameters"]["sidecar"] = str(other)
    linear = recipe_of(a, b, method="linear")
    for entry, weight in zip(linear["models"], [0.3, 0.9], strict=True):
        entry["parameters"] = {"weight": weight}
    assert_close(merged(recipe, tmp_path / "1"), merged(linear, tmp_path / "2"))


def test_lambda_zero_removes_a_model_and_does_not_read_it(pair, tmp_path):
    (a, _), (theta, _), _ = pair
    broken, weights, _ = make_measured(tmp_path / "broken", "llama", seed=9)
    rewrite(broken, {n: t * torch.nan for n, t in weights.items()})  # its sidecar is foreign now
    found = merged(recipe_of(a, broken, lambdas=[1, 0]), tmp_path / "out")
    assert all(torch.equal(tensor, theta[name]) for name, tensor in found.items())


def test_weight_is_a_synonym_of_lambda(pair, tmp_path):
    recipe = recipe_of(*pair[0], parameters={"weight": 5})
    recipe["models"][0]["parameters"] = {"weight": 0.1}
    assert_close(merged(recipe, tmp_path), oracle(pair, [0.1, 5]))


def test_unnormalized_fishers(pair, tmp_path):
    recipe = recipe_of(*pair[0], parameters={"normalize_fishers": False, "floor": 0})
    _, (theta, _), _ = pair
    # The second model's Fisher is 1e-12 of the first's, which therefore wins.
    assert_close(merged(recipe, tmp_path), theta, rtol=1e-3, atol=1e-3)


def test_floor_and_favor_base(tmp_path):
    """Where nobody knows anything, the floor decides: the mean, or the base model's value."""
    a, theta_a, fisher_a = make_measured(tmp_path / "a", "llama", seed=1)
    b, theta_b, fisher_b = make_measured(tmp_path / "b", "llama", seed=2)
    unknown = "model.layers.1.mlp.up_proj.weight"
    for fishers, folder in ((fisher_a, a), (fisher_b, b)):
        fishers[unknown].zero_()
        write_fishers(folder, fishers)
    mean = (theta_a[unknown] * 3 + theta_b[unknown]) / 4
    for floor in (0, 1e-3):
        recipe = recipe_of(a, b, lambdas=[3, 1], parameters={"floor": floor})
        found = merged(recipe, tmp_path / f"floor{floor}")
        torch.testing.assert_close(found[unknown], mean, rtol=1e-5, atol=1e-5)
    options = {"floor": 1e-3, "favor_base": True}
    recipe = recipe_of(a, b, lambdas=[3, 1], base_model=str(b), parameters=options)
    expected = merge_oracle.merge(
        [theta_a, theta_b], [fisher_a, fisher_b], [3, 1], list(theta_a), floor=1e-3, favor=1
    )
    found = merged(recipe, tmp_path / "favor")
    assert_close(found, expected)
    torch.testing.assert_close(found[unknown], theta_b[unknown], rtol=1e-6, atol=1e-6)
    # A model with lambda 0 is not read, which must not shift who is favoured.
    recipe = recipe_of(a, b, lambdas=[0, 1], base_model=str(b), parameters=options)
    assert_close(merged(recipe, tmp_path / "alone"), theta_b)
    # A favoured base keeps the floor also where its lambda is 0.
    recipe = recipe_of(a, b, lambdas=[3, 0], base_model=str(b), parameters=options)
    expected = merge_oracle.merge(
        [theta_a, theta_b], [fisher_a, fisher_b], [3, 0], list(theta_a), floor=1e-3, favor=1
    )
    assert_close(merged(recipe, tmp_path / "favor0"), expected)


def test_filters_and_layer_gradients(pair, tmp_path):
    recipe = recipe_of(*pair[0])
    recipe["models"][0]["parameters"] = {
        "lambda": [
            {"filter": "self_attn", "value": 0},
            {"filter": "mlp", "value": [1, 5]},
            {"value": 2},
        ]
    }
    expected = {}
    for name in pair[1][0]:
        layer_1 = ".layers.1." in name
        first = 0 if "self_attn" in name else (5 if layer_1 else 1) if "mlp" in name else 2
        expected[name] = oracle(pair, [first, 1])[name]
    assert_close(merged(recipe, tmp_path), expected)


def test_unlisted_base_model_gives_only_what_is_excluded(pair, tmp_path):
    base = make_model(tmp_path / "base", "llama", seed=7)  # not measured: nobody asks for it
    recipe = recipe_of(*pair[0], base_model=str(base), parameters={"exclude": ["lm_head", "norm"]})
    kept = {n: t for n, t in read(base).items() if "lm_head" in n or "norm" in n}
    _, thetas, fishers = pair
    names = [name for name in thetas[0] if name not in kept]
    expected = {**kept, **merge_oracle.merge(thetas, fishers, [1, 1], names)}
    found = merged(recipe, tmp_path / "out")
    assert_close(found, expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in kept.items())


def test_sliced_recipe_takes_statistics_from_the_source_layer(pair, tmp_path):
    """Output layers: (A1 with B0), then (A0 with B1), then A1 alone."""
    (a, b), (theta_a, theta_b), (fisher_a, fisher_b) = pair

    def piece(*sources):
        return {
            "sources": [
                {"model": str(m), "layer_range": [i, i + 1], "parameters": {"lambda": lam}}
                for m, i, lam in sources
            ]
        }

    recipe = {
        "merge_method": "fisher",
        "dtype": "float32",
        "slices": [
            piece((a, 1, 0.4), (b, 0, 0.6)),
            piece((a, 0, 0.9), (b, 1, 0.1)),
            piece((a, 1, 2.0)),
        ],
    }
    found = merged(recipe, tmp_path)
    loose = ["model.embed_tokens.weight"]  # joins the first slice's models, others the last's
    met = [n for n in theta_b if ".layers." in n] + loose
    scales = [merge_oracle.scale(fisher, met) for fisher in (fisher_a, fisher_b)]

    expected = {n: theta_a[n] for n in ("model.norm.weight", "lm_head.weight")}
    expected[loose[0]] = merge_oracle.merge_tensor(
        [theta_a[loose[0]], theta_b[loose[0]]],
        [fisher_a[loose[0]], fisher_b[loose[0]]],
        [0.4, 0.6],
        scales,
    )
    for name in (n for n in theta_a if ".layers.0." in n):
        one = name.replace(".layers.0.", ".layers.1.")
        two = name.replace(".layers.0.", ".layers.2.")
        expected[name] = merge_oracle.merge_tensor(
            [theta_a[one], theta_b[name]], [fisher_a[one], fisher_b[name]], [0.4, 0.6], scales
        )
        expected[one] = merge_oracle.merge_tensor(
            [theta_a[name], theta_b[one]], [fisher_a[name], fisher_b[one]], [0.9, 0.1], scales
        )
        expected[two] = theta_a[one]
    assert_close(found, expected)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.num_hidden_layers == 3


def test_repeated_layers_and_an_excluded_part_of_them(pair, tmp_path):
    """Every output layer gets the excluded tensor of the base's *source* layer."""
    (a, b), (theta_a, _), _ = pair
    layers = [{"model": str(m), "layer_range": [1, 2]} for m in (a, b)]
    recipe = {
        "merge_method": "fisher",
        "base_model": str(a),
        "parameters": {"exclude": ["input_layernorm"]},
        "slices": [{"sources": layers}, {"sources": layers}],
    }
    found = merged(recipe, tmp_path)
    expected = theta_a["model.layers.1.input_layernorm.weight"]
    for layer in (0, 1):
        assert torch.equal(found[f"model.layers.{layer}.input_layernorm.weight"], expected)
        one, two = (f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1))
        assert torch.equal(found[one], found[two])


def test_tied_and_untied_models(tmp_path):
    """The tied model's embedding, and what was measured of it, stand in for its missing head."""
    a, theta_a, fisher_a = make_measured(tmp_path / "a", "llama", seed=1)
    b, theta_b, fisher_b = make_measured(tmp_path / "b", "llama", seed=2, tie_word_embeddings=True)
    assert "lm_head.weight" not in theta_b
    found = merged(recipe_of(a, b, base_model=str(a)), tmp_path / "out")
    scales = [
        merge_oracle.scale(fisher_a, list(fisher_a)),
        merge_oracle.scale(fisher_b, list(fisher_b)),
    ]
    expected = merge_oracle.merge_tensor(
        [theta_a["lm_head.weight"], theta_b["model.embed_tokens.weight"]],
        [fisher_a["lm_head.weight"], fisher_b["model.embed_tokens.weight"]],
        [1, 1],
        scales,
    )
    assert_close({"x": found["lm_head.weight"]}, {"x": expected})


def test_buffers_are_copied_and_unmeasured_floats_averaged(tmp_path):
    """`position_ids` is an integer buffer; here the pooler plays a float that is no parameter."""
    folders = []
    for seed, name in ((1, "a"), (2, "b")):
        folder = make_model(tmp_path / name, seed=seed)
        weights = read(folder)
        weights["bert.embeddings.position_ids"] = torch.arange(16)[None]
        rewrite(folder, weights)
        fishers = random_fishers(folder, seed)
        pooler = {n: "a buffer" for n in list(fishers) if "pooler" in n}
        fishers = {n: f for n, f in fishers.items() if n not in pooler}
        write_fishers(folder, fishers, unmeasured=pooler)
        folders.append((folder, weights, fishers))
    (a, theta_a, fisher_a), (b, theta_b, fisher_b) = folders
    found = merged(recipe_of(a, b, lambdas=[1, 3], dtype="bfloat16"), tmp_path / "out")
    expected = merge_oracle.merge([theta_a, theta_b], [fisher_a, fisher_b], [1, 3], list(fisher_a))
    for name in theta_a:
        if "pooler" in name:
            expected[name] = (theta_a[name] + 3 * theta_b[name]) / 4
    expected["bert.embeddings.position_ids"] = theta_a["bert.embeddings.position_ids"]
    assert found["bert.embeddings.position_ids"].dtype == torch.int64
    assert_close(found, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("tops", [{}, {"out_dtype": "float16"}, {"dtype": None}])
def test_output_dtype(pair, tmp_path, tops):
    found = merged(recipe_of(*pair[0], **{"dtype": "bfloat16", **tops}), tmp_path)
    wanted = {"out_dtype": torch.float16, "dtype": torch.float32}
    expected = next((wanted[key] for key in tops), torch.bfloat16)
    assert {tensor.dtype for tensor in found.values()} == {expected}
    if expected == torch.float16:  # rounded once: bfloat16 in between would be far coarser
        assert_close(found, oracle(pair, [1, 1]), rtol=1e-3, atol=1e-4)


def test_plan_in_memory_as_evolution_does(pair, tmp_path):
    assert_close(run_planned(planned(recipe_of(*pair[0]))), oracle(pair, [1, 1]))


def test_merges_that_are_planned_before_any_of_them_runs(pair, tmp_path):
    """And what is open for one is not kept for all that follow in this process."""
    other = make_measured(tmp_path / "other", "llama", seed=3)
    recipe = recipe_of(pair[0][0], other[0])
    first, second = planned(recipe_of(*pair[0])), planned(recipe)
    assert_close(run_planned(first), oracle(pair, [1, 1]))
    mixed = [list(x) for x in zip([x[0] for x in pair], other, strict=True)]
    assert_close(run_planned(second), oracle(mixed, [1, 1]))
    planned(recipe)
    assert {str(model) for (model,) in files.OPENED.made} == {str(pair[0][0]), str(other[0])}
    assert len(sidecars.OPENED.made) == 2


def test_executor_finishes_one_tensor_before_the_next(tmp_path):
    """Also where two models' files call a tensor differently: nothing is kept waiting in memory."""
    a, _, _ = make_measured(tmp_path / "a", "gpt2", seed=1)
    b = make_model(tmp_path / "b", "gpt2", seed=2)
    rewrite(b, {name.removeprefix("transformer."): t for name, t in read(b).items()})
    write_fishers(b, random_fishers(b, 2))
    labels = [task.group_label() for task in scheduled(planned(recipe_of(a, b)))]
    changes = sum(x != y for x, y in itertools.pairwise(labels))
    assert changes == len(set(labels)) - 1


def test_modules_recipe(pair, tmp_path):
    recipe = recipe_of(*pair[0], lambdas=[0.2, 0.8])
    recipe["modules"] = {"default": {"models": recipe.pop("models")}}
    assert_close(merged(recipe, tmp_path), oracle(pair, [0.2, 0.8]))


def test_device_options(pair, tmp_path):
    options = {"device": "cpu", "low_cpu_memory": True, "read_to_gpu": True, "async_write": True}
    assert_close(merged(recipe_of(*pair[0]), tmp_path, **options), oracle(pair, [1, 1]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "flags", [{"cuda": True}, {"cuda": True, "read_to_gpu": True}, {"gpu_rich": True}]
)
def test_on_a_gpu(pair, tmp_path, flags):
    assert_close(merged(recipe_of(*pair[0]), tmp_path, **flags), oracle(pair, [1, 1]))


def test_sidecar_measured_anew_between_two_merges(pair, tmp_path):
    """Nothing of the first planning may linger."""
    a, theta_a, fisher_a = make_measured(tmp_path / "a", "llama", seed=5)
    (b, *_), (theta_b, *_), (fisher_b, *_) = pair
    merged(recipe_of(a, b), tmp_path / "1")
    fisher_a = random_fishers(a, 77)
    write_fishers(a, fisher_a)
    expected = merge_oracle.merge([theta_a, theta_b], [fisher_a, fisher_b], [1, 1], list(theta_a))
    assert_close(merged(recipe_of(a, b), tmp_path / "2"), expected)


def test_published_single_file_is_a_sidecar_too(pair, tmp_path):
    (a, b), _, _ = pair
    recipe = recipe_of(a, b)
    recipe["models"][1]["parameters"] = {"sidecar": str(b / "sidecar" / "fisher.safetensors")}
    assert_close(merged(recipe, tmp_path), oracle(pair, [1, 1]))
