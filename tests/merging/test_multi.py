"""Our methods in any stage of `mergekit-multi`, and in the merges that `mergekit-evolve` makes."""

from __future__ import annotations

import merge_oracle
import pytest
import torch
import yaml
from click.testing import CliRunner
from factors import make_described, merged_model
from mergekit.config import MergeConfiguration
from mergekit.evo.genome import ModelGenome, ModelGenomeDefinition
from mergekit.graph import Executor
from mergekit.io.tasks import LoaderCache, ReturnTensor
from mergekit.merge import _model_out_config
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from mergekit.scripts import multimerge
from models import make_measured, random_fishers, read, write_fishers
from running import assert_close, recipe_of

from fisher_mergekit.errors import PlanningError
from fisher_mergekit.methods import METHODS


@pytest.fixture
def three(tmp_path):
    """Return three measured models: folders, weights, Fishers."""
    made = [make_measured(tmp_path / n, "llama", seed=i) for i, n in enumerate("abc")]
    return list(zip(*made, strict=True))


@pytest.fixture
def multi(tmp_path, monkeypatch):
    """Return a function that runs mergekit-multi on some recipes."""
    monkeypatch.setattr(LoaderCache, "loaders", {})

    def run(*recipes, **names):
        content = [*({"name": n, **r} for n, r in names.items()), *recipes]
        path = tmp_path / "recipes.yml"
        path.write_text(yaml.safe_dump_all(content, sort_keys=False))
        arguments = ["--out-path", tmp_path / "out", "-I", tmp_path / "steps"]
        flags = ["--quiet", "--no-copy-tokenizer", "--no-write-model-card"]
        return CliRunner().invoke(multimerge.main, [str(x) for x in [path, *arguments, *flags]])

    return run


def finished(result):
    assert result.exit_code == 0, result.output + repr(result.exception)


def refused(result):
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def linear(*models, weights):
    recipe = recipe_of(*models, method="linear")
    for entry, weight in zip(recipe["models"], weights, strict=True):
        entry["parameters"] = {"weight": weight}
    return recipe


def fisher(thetas, fishers, lambdas=(1, 1)):
    return merge_oracle.merge(thetas, fishers, lambdas, list(thetas[0]))


class TestStages:
    def test_linear_after_fisher(self, three, multi, tmp_path):
        """What has no sidecar needs none."""
        (a, b, c), thetas, fishers = three
        finished(multi(linear("first", c, weights=[1, 3]), first=recipe_of(a, b, lambdas=[1, 2])))
        first = fisher(thetas[:2], fishers[:2], [1, 2])
        expected = {n: (first[n] + 3 * thetas[2][n]) / 4 for n in first}
        assert_close(read(tmp_path / "steps" / "first"), first)
        assert_close(read(tmp_path / "out"), expected)

    def test_fisher_after_linear(self, three, multi, tmp_path):
        """It stops with the command that measures the intermediate model, and goes on after it."""
        (a, b, c), thetas, fishers = three
        stages = {"first": linear(a, b, weights=[1, 1])}
        steps = tmp_path / "steps" / "first"
        said = refused(multi(recipe_of("first", c), **stages))
        assert f"{steps}: there is no sidecar at {steps / 'sidecar'}." in said
        assert f"Run: mergekit-fisher precompute --model {steps} --path DATA" in said
        first = {n: (thetas[0][n] + thetas[1][n]) / 2 for n in thetas[0]}
        assert_close(read(steps), first)
        assert not (tmp_path / "out").exists()

        before = (steps / "model.safetensors").stat().st_mtime_ns
        measured = random_fishers(steps, 9)
        write_fishers(steps, measured)
        finished(multi(recipe_of("first", c), **stages))
        assert (steps / "model.safetensors").stat().st_mtime_ns == before
        expected = fisher([read(steps), thetas[2]], [measured, fishers[2]])
        assert_close(read(tmp_path / "out"), expected)

    def test_a_sidecar_elsewhere(self, three, multi, tmp_path):
        """Named in the recipe, and in the command that measures what it lacks."""
        (a, b, c), thetas, fishers = three
        first = linear(a, b, weights=[1, 0])
        place = tmp_path / "elsewhere"
        second = recipe_of("first", c)
        second["models"][0]["parameters"] = {"sidecar": str(place), "lambda": 2}
        steps = tmp_path / "steps" / "first"
        said = refused(multi(second, first=first))
        assert f"precompute --model {steps} --out {place} --path DATA" in said
        measured = random_fishers(steps, 9)
        write_fishers(steps, measured, out=place)
        finished(multi(second, first=first))
        assert_close(
            read(tmp_path / "out"), fisher([thetas[0], thetas[2]], [measured, fishers[2]], [2, 1])
        )

    def test_a_stage_that_was_made_anew_is_not_what_was_measured(self, three, multi, tmp_path):
        (a, b, c), _, _ = three
        steps = tmp_path / "steps" / "first"
        finished(multi(first=linear(a, b, weights=[1, 1])))
        write_fishers(steps, random_fishers(steps, 9))
        (steps / "config.json").unlink()  # for mergekit it is not there any more
        said = refused(multi(recipe_of("first", c), first=linear(a, b, weights=[1, 2])))
        assert f"{steps}: the sidecar {steps / 'sidecar'} was measured on other weights" in said
        assert f"precompute --model {steps} --path DATA --text COLUMN" in said
        assert "--force" not in said  # `precompute` sees that it is of other weights

    def test_several_stages_of_ours(self, three, multi, tmp_path):
        """Two Fisher merges, averaged; one process plans and merges all of them."""
        (a, b, c), thetas, fishers = three
        finished(
            multi(
                linear("left", "right", weights=[1, 1]),
                left=recipe_of(a, b, lambdas=[1, 2]),
                right=recipe_of(b, c, base_model=str(b), parameters={"exclude": ["lm_head"]}),
            )
        )
        left = fisher(thetas[:2], fishers[:2], [1, 2])
        body = [n for n in thetas[0] if n != "lm_head.weight"]
        right = merge_oracle.merge(thetas[1:], fishers[1:], [1, 1], body)
        right["lm_head.weight"] = thetas[1]["lm_head.weight"]
        expected = {n: (left[n] + right[n]) / 2 for n in left}
        assert_close(read(tmp_path / "out"), expected)

    def test_layers_of_an_intermediate_merge(self, three, multi, tmp_path):
        """By another of our methods, sliced, with the other kind of sidecar."""
        made = [make_described(tmp_path / f"g{i}", "llama", "gram", seed=i) for i in range(2)]
        finished(multi(first=recipe_of(*(m.folder for m in made), method="regmean")))
        steps = tmp_path / "steps" / "first"
        assert_close(read(steps), merged_model(made, [1, 1]), rtol=1e-4, atol=1e-4)
        fishers = random_fishers(steps, 4)
        write_fishers(steps, fishers)
        (a, *_), (theta_a, *_), (fisher_a, *_) = three
        layer = {"sources": [{"model": m, "layer_range": [i, i + 1]} for m, i in
                             (("first", 1), (str(a), 0))]}  # fmt: skip
        sliced = {"merge_method": "fisher", "dtype": "float32", "slices": [layer]}
        finished(multi(sliced, first=recipe_of(*(m.folder for m in made), method="regmean")))

        def moved(tensors, index):
            part = f".layers.{index}."
            return {n.replace(part, ".layers.0."): t for n, t in tensors.items()
                    if part in n or ".layers." not in n}  # fmt: skip

        thetas = [moved(read(steps), 1), moved(theta_a, 0)]
        expected = fisher(thetas, [moved(fishers, 1), moved(fisher_a, 0)])
        assert_close(read(tmp_path / "out"), expected)


class TestEvolution:
    """mergekit-evolve turns a genotype into a recipe, plans it in memory, and runs it."""

    def in_memory(self, config, example):
        """Merge as its evaluator does."""
        options = MergeOptions()
        LoaderCache().setup(options)
        from mergekit.architecture import arch_info_for_config

        info = arch_info_for_config(example)
        planner = MergePlanner(config, info, options, _model_out_config(config, info))
        tasks = planner.plan_in_memory()
        executor = Executor(tasks, math_device="cpu", storage_device="cpu")
        found = {}
        for task, value in executor.run(quiet=True):
            assert isinstance(task, ReturnTensor)
            found[task.weight_info.name] = value
        return found

    def genome(self, models, **definition):
        content = {"models": [str(m) for m in models], "merge_method": "linear", **definition}
        return ModelGenome(ModelGenomeDefinition.model_validate(content))

    def recipe(self, genome, genotype):
        """Return the recipe of a genotype, as it would be for `fisher`."""
        config = genome.genotype_merge_config(genotype).model_dump(mode="json", exclude_none=True)
        del config["parameters"]  # of `linear`
        return MergeConfiguration.model_validate({**config, "merge_method": "fisher"})

    def test_generations_in_one_process(self, three):
        """Lambdas of each group of layers, by filters; statistics are opened anew each time."""
        (a, b, _), thetas, fishers = three
        genome = self.genome([a, b], layer_granularity=1, filters=["self_attn"])
        for seed in range(3):
            genotype = torch.rand(2, 2, 2, 1, generator=torch.Generator().manual_seed(seed))
            config = self.recipe(genome, genotype)
            assert len(config.slices) == 2
            found = self.in_memory(config, genome._input_config_example)
            expected = {}
            for name in thetas[0]:
                group = 0 if "embed" in name or ".layers.0." in name else 1
                rule = 0 if "self_attn" in name else 1
                lambdas = genotype[group, :, rule, 0].tolist()
                expected[name] = fisher(thetas[:2], fishers[:2], lambdas)[name].bfloat16()
            assert_close(found, expected, rtol=1e-2, atol=1e-3)

    def test_gradients_over_the_layers(self, three):
        (a, b, _), thetas, fishers = three
        genome = self.genome([a, b], layer_granularity=1, smooth=True)
        genotype = torch.tensor([0.2, 0.9, 0.5, 0.4]).view(2, 2, 1, 1)
        found = self.in_memory(self.recipe(genome, genotype), genome._input_config_example)
        for name in (n for n in thetas[0] if ".layers." in n):
            lambdas = genotype[1 if ".layers.1." in name else 0, :, 0, 0].tolist()
            expected = fisher(thetas[:2], fishers[:2], lambdas)[name].bfloat16()
            torch.testing.assert_close(found[name], expected, rtol=1e-2, atol=1e-3)

    @pytest.mark.parametrize("method", METHODS)
    def test_its_configuration_cannot_name_ours(self, three, method):
        """It has a list of its own. If it is opened one day, docs/recipe.md has more to say."""
        with pytest.raises(ValueError, match="Invalid merge method"):
            self.genome(three[0], merge_method=method)

    def test_what_it_would_write_into_the_recipe_is_named(self, three):
        genome = self.genome(three[0][:2])
        config = genome.genotype_merge_config(genome.initial_genotype())
        content = {**config.model_dump(mode="json", exclude_none=True), "merge_method": "fisher"}
        with pytest.raises(PlanningError, match="unknown parameter 'int8_mask'"):
            self.in_memory(MergeConfiguration.model_validate(content), genome._input_config_example)
