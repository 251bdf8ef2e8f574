"""What we rely on mergekit to do: a new version of it should fail here. Its code runs alone.

Which names, fields and signatures we need is in `test_names.py`.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import mergekit
import pytest
import torch
from mergekit.architecture import get_architecture_info
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor, Task
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods.base import InputContract, MergeMethod, ParameterScope, ParameterSpec
from mergekit.options import MergeOptions, ShardSizeParamType
from mergekit.parameter_resolver import resolve_parameter
from mergekit.plan import MergePlanner
from mergekit.scripts import multimerge, run_yaml
from mergekit.tokenizer import BuildTokenizer, PermutedVocabulary
from mergekit.tokenizer.config import TokenEmbeddingConfig
from mergekit.tokenizer.truncate import TruncatedVocabulary
from models import make_model, read
from running import recipe_of
from tokenizers_of_words import SPECIAL, give_tokenizer


def planned(recipe: dict) -> tuple[MergePlanner, list[tuple]]:
    """Let mergekit walk over a recipe; return the planner, and its calls of plan_tensor."""
    config = MergeConfiguration.model_validate(recipe)
    options = MergeOptions()
    LoaderCache().setup(options)
    model = config.base_model or config.referenced_models()[0]
    planner = MergePlanner(config, get_architecture_info(config, options), options, model.config())
    calls: list[tuple] = []

    def plan_tensor(weight, weights_in, models, cfg_reader):
        calls.append((weight, list(weights_in), list(models), cfg_reader))

    planner.plan_tensor = plan_tensor
    planner._plan()
    return planner, calls


@pytest.fixture
def pair(tmp_path):
    return [make_model(tmp_path / n, "llama", seed=s) for s, n in enumerate("ab")]


class TestCommands:
    @pytest.mark.parametrize("script", [run_yaml, multimerge])
    def test_commands_are_known_by_their_modules_and_what_was_typed_by_its_name(self, script):
        assert script.main.callback.__module__ == script.__name__
        assert "config_file" in [parameter.name for parameter in script.main.params]


class TestRecipes:
    def test_nothing_reads_residual_weight(self):
        """A recipe that has it is refused, because it would be another merge."""
        root = Path(mergekit.__file__).parent
        found = {path for path in root.rglob("*.py") if b"residual_weight" in path.read_bytes()}
        assert found == {root / "config.py"}

    def test_unknown_keys_are_ignored_wherever_calibration_stands(self):
        MergeConfiguration.model_validate(
            {
                "merge_method": "linear",
                "models": [{"model": "a", "calibration": {"path": "x"}}],
                "calibration": {"examples": 3},
            }
        )

    def test_a_list_of_names_comes_through_as_it_is(self):
        config = MergeConfiguration.model_validate(
            {"merge_method": "x", "models": [{"model": "a"}], "parameters": {"exclude": ["p", "q"]}}
        )
        assert config.parameters == {"exclude": ["p", "q"]}

    def test_references(self):
        reference = ModelReference.model_validate("org/base@v1+org/adapter")
        assert (reference.model.path, reference.model.revision) == ("org/base", "v1")
        assert reference.lora.path == "org/adapter"
        assert str(reference) == "org/base@v1+org/adapter"
        assert hash(reference) == hash(ModelReference.model_validate(str(reference)))

    def test_a_folder_is_its_own_local_path(self, tmp_path):
        reference = ModelReference.model_validate(str(tmp_path))
        assert reference.local_path(cache_dir=None) == str(tmp_path)
        assert reference.merged() is reference

    def test_dtypes(self):
        assert dtype_from_name(None) is None
        assert dtype_from_name("bfloat16") is torch.bfloat16
        assert ShardSizeParamType().convert("5B", None, None) == 5 * 10**9


class TestSettings:
    NUMBER = ParameterSpec("lambda", float | None, ParameterScope.INPUT, default=None)

    def resolve(self, setting, tensor="model.layers.0.q", t=0.0, spec=NUMBER):
        return resolve_parameter(spec, [None, {"lambda": setting}], tensor_name=tensor, t=t)

    def test_the_first_filter_that_is_part_of_the_name_holds(self):
        from mergekit.config import ConditionalParameter as When

        setting = [When(filter="layers.0", value=1), When(filter="q", value=2), When(value=3)]
        assert self.resolve(setting) == 1
        assert self.resolve(setting, "model.layers.1.q") == 2
        assert self.resolve(setting, "model.norm") == 3

    def test_a_list_of_numbers_is_a_gradient_over_t(self):
        assert [self.resolve([0.0, 1.0, 4.0], t=t) for t in (0, 0.25, 0.75, 1)] == [0, 0.5, 2.5, 4]

    def test_what_is_not_said_is_the_default_and_1e_6_a_number(self):
        assert resolve_parameter(self.NUMBER, [{}, None], tensor_name="x") is None
        assert self.resolve("1e-6") == 1e-6

    def test_the_narrower_place_wins(self):
        both = [{"lambda": 1}, {"lambda": 2}]
        assert resolve_parameter(self.NUMBER, both, tensor_name="x") == 1


class TestPlanner:
    def test_the_walk_names_every_tensor_of_the_architecture(self, pair):
        _, calls = planned(recipe_of(*pair, method="linear", parameters={"weight": 1}))
        assert {weight.name for weight, *_ in calls if not weight.optional} <= set(read(pair[0]))
        assert set(read(pair[0])) <= {weight.name for weight, *_ in calls}
        for weight, weights_in, models, reader in calls:
            assert [w.name for w in weights_in] == [weight.name] * 2
            assert [str(m) for m in models] == [str(m) for m in pair]
            assert reader.slice_out is not None

    def test_layers_go_by_their_sources(self, pair):
        def piece(*layers):
            sources = zip(pair, layers, strict=False)
            return {"sources": [{"model": str(m), "layer_range": [i, i + 1]} for m, i in sources]}

        _, calls = planned(
            {"merge_method": "linear", "slices": [piece(1, 0), piece(1)],
             "parameters": {"weight": 1}, "dtype": "float32"}
        )  # fmt: skip
        found = {w.name: ([x.name for x in ins], len(models)) for w, ins, models, _ in calls}
        name = "model.layers.{}.mlp.up_proj.weight"
        assert found[name.format(0)] == ([name.format(1), name.format(0)], 2)
        assert found[name.format(1)] == ([name.format(1)], 1)
        # One name for each model of the *first* slice. `record_walk` puts it right; when mergekit
        # does, it need not any more.
        assert found["model.norm.weight"] == (["model.norm.weight"] * 2, 1)

    def test_an_unlisted_base_model_becomes_an_input(self, pair, tmp_path):
        base = make_model(tmp_path / "base", "llama", seed=9)
        recipe = recipe_of(*pair, method="linear", parameters={"weight": 1})
        planner, _ = planned({**recipe, "base_model": str(base)})
        (module,) = planner.config.modules.values()
        (piece,) = module.slices
        assert [str(source.model) for source in piece.sources] == [*map(str, pair), str(base)]
        assert planner.config.models is None
        # Brought into normal form while no base is seen, it stays out; we rely on that.
        config = MergeConfiguration.model_validate(recipe)
        options = MergeOptions()
        info = get_architecture_info(config, options)
        again = MergePlanner(config, info, options, ModelReference.parse(str(base)).config())
        again.normalize_config()
        config.base_model = ModelReference.parse(str(base))
        again.normalize_config()
        assert len(next(iter(config.modules.values())).slices[0].sources) == 2

    @pytest.mark.parametrize("way", ["disk", "memory"])
    def test_both_ways_of_planning_take_what_plan_leaves(self, pair, tmp_path, monkeypatch, way):
        planner, calls = planned(recipe_of(*pair, method="linear", parameters={"weight": 1}))
        weight, task = calls[0][0], Note(name="one of ours")
        monkeypatch.setattr(MergePlanner, "_plan", lambda self: None)
        planner._tensors = [(weight, task)]
        if way == "disk":
            (save, _finalize) = planner.plan_to_disk(str(tmp_path / "out"))
            assert (save.tensor_name, save.tensor_task) == (weight.name, task)
        else:
            (back,) = planner.plan_in_memory()
            assert (back.weight_info, back.tensor_task) == (weight, task)

    def test_the_planner_names_the_slice_whose_inputs_it_validates(self, pair, monkeypatch):
        """Who names none, as mergekit-pytorch, has tensors and no recipe."""
        seen = []
        monkeypatch.setattr(
            MergeMethod, "validate_inputs", lambda *_, group_name=None: seen.append(group_name)
        )
        planned(recipe_of(*pair, method="linear", parameters={"weight": 1}))
        assert seen
        assert all(seen)

    def test_a_contract_that_ignores_the_base(self):
        one, two = (ModelReference.parse(name) for name in "ab")
        InputContract().validate_ids([one], two)

    def test_an_architectures_tensors(self, pair):
        config = MergeConfiguration.model_validate(recipe_of(*pair, method="linear"))
        info = get_architecture_info(config, MergeOptions())
        model_config = ModelReference.parse(str(pair[0])).config()
        assert {w.name for w in info.all_weights(model_config)} >= set(read(pair[0]))


class Note(Task[torch.Tensor]):
    """A task that writes down that it is done."""

    name: str
    label: str = ""
    after: tuple[Task, ...] = ()
    late: int = 0
    on_device: bool = False

    def arguments(self):
        return {f"a{i}": task for i, task in enumerate(self.after)}

    def group_label(self):
        return self.label

    def priority(self):
        return self.late

    def uses_accelerator(self):
        return self.on_device

    def execute(self, **inputs):
        done.append((self.name, {key: value.device.type for key, value in inputs.items()}))
        return torch.zeros(1)


done: list[tuple[str, dict]] = []


class TestExecutor:
    @pytest.fixture(autouse=True)
    def nothing_done(self):
        done.clear()

    def test_tasks_that_are_equal_are_done_once(self):
        one, same = Note(name="load"), Note(name="load")
        assert one is not same
        assert one == same
        list(
            Executor([Note(name="x", after=(one,)), Note(name="y", after=(same,))]).run(quiet=True)
        )
        assert sorted(name for name, _ in done) == ["load", "x", "y"]

    def test_labels_come_in_order_and_what_is_late_comes_last(self):
        """So one output tensor is finished, and what it needed let go, before the next begins."""
        targets = [
            Note(
                name=f"merge {label}",
                label=label,
                after=tuple(Note(name=f"load {label}{i}", label=label, late=-1000) for i in (0, 1)),
            )
            for label in ("b", "c", "a")
        ]
        list(Executor(targets).run(quiet=True))
        assert [name for name, _ in done if name.startswith("merge")] == [
            "merge a", "merge b", "merge c",
        ]  # fmt: skip
        assert [name[-2:-1] if "load" in name else "" for name, _ in done] == [
            *("a", "a", ""), *("b", "b", ""), *("c", "c", ""),
        ]  # fmt: skip

    def test_inputs_are_moved_only_for_what_uses_an_accelerator(self):
        load = Note(name="load")
        targets = [Note(name="x", after=(load,), on_device=True), Note(name="y", after=(load,))]
        list(Executor(targets, math_device="meta", storage_device="cpu").run(quiet=True))
        assert dict(done) == {"load": {}, "x": {"a0": "meta"}, "y": {"a0": "cpu"}}


class TestLoaders:
    def test_one_cache_a_thread_with_the_commands_flags(self, tmp_path):
        cache = LoaderCache()
        assert LoaderCache() is cache
        options = {
            "lora_merge_cache": str(tmp_path / "loras"),
            "transformers_cache": str(tmp_path / "hub"),
            "trust_remote_code": True,
        }
        cache.setup(MergeOptions(**options))
        try:
            found = (cache.lora_cache_dir, cache.hf_cache_dir, cache.trust_remote_code)
            assert found == tuple(options.values())
        finally:
            cache.setup(MergeOptions())

    def test_the_folder_of_a_model_with_an_adapter(self, tmp_path, monkeypatch):
        """Of what is there already nothing is made anew."""
        pair = ModelReference.model_validate("org/base@v1+org/adapter")
        made = tmp_path / f"{pair.model._unique_id()}_{pair.lora._unique_id()}"
        made.mkdir()
        assert pair.merged(cache_dir=str(tmp_path)).model.path == str(made)

    def test_parts_of_a_loader(self, pair):
        loader = LoaderCache().get(ModelReference.model_validate(str(pair[0])))
        assert Path(loader.index.base_path) == pair[0]


class TestVocabularies:
    def test_where_each_models_tokens_are(self, pair):
        """Number of a token in the output -> the model's row, -1 for none."""
        give_tokenizer(pair[0])
        give_tokenizer(pair[1], tokens=(*SPECIAL, "dog", "new"))
        config = MergeConfiguration.model_validate(
            recipe_of(
                *pair,
                method="linear",
                parameters={"weight": 1},
                tokenizer_source="union",
                base_model=str(pair[0]),
            )
        )
        options = MergeOptions()
        info = get_architecture_info(config, options)
        planner = MergePlanner(config, info, options, ModelReference.parse(str(pair[0])).config())
        task = planner._tokenizer_task
        assert isinstance(task, BuildTokenizer)
        planner._plan()
        assert task in planner.plan_to_disk("out"), "it is done whether or not a tensor needs it"
        built = task.execute()
        numbers = built.tokenizer.get_vocab()
        one, two = (ModelReference.parse(str(model)) for model in pair)
        own = built.original_vocabs[two]
        assert built.permutations[two][numbers["dog"]] == own["dog"]
        assert built.permutations[two][numbers["cat"]] == -1
        assert built.permutations[one][numbers["cat"]] == built.original_vocabs[one]["cat"]

    def test_which_rows_the_models_get(self):
        """Of tokens 0 in all, 1 in one, 2 in two, 3 in none, and 4 forced; 5 is padding."""
        models = [ModelReference.parse(name) for name in "abc"]
        has = [{0: 0, 4: 1, 2: 2}, {0: 2, 4: 0, 2: 1}, {1: 0, 0: 1, 4: 2}]
        tables = [torch.eye(3) + 10 * i for i in range(3)]
        info = SimpleNamespace(
            tokenizer=SimpleNamespace(get_vocab=lambda: {str(i): i for i in range(5)}),
            permutations={
                model: {i: row.get(i, -1) for i in range(5)}
                for model, row in zip(models, has, strict=True)
            },
        )

        def given(base):
            task = PermutedVocabulary.model_construct(
                tokens={"4": TokenEmbeddingConfig(source=models[1], force=True)},
                pad_to_multiple_of=6,
                base_model=base,
                vocabulary_axis=0,
            )
            return task.execute(info, dict(zip(models, tables, strict=True)))

        for base, filled in [(None, (tables[0][2] + tables[1][1]) / 2), (models[0], tables[0][2])]:
            for (model, rows), has_row, table in zip(given(base).items(), has, tables, strict=True):
                assert torch.equal(rows[0], table[has_row[0]]), model
                assert torch.equal(rows[1], tables[2][0]), "the row of the only one"
                assert torch.equal(rows[2], table[has_row[2]] if 2 in has_row else filled)
                assert torch.equal(rows[3], torch.zeros(3)), "nobody has it"
                assert torch.equal(rows[4], tables[1][0]), "obeyed"
                assert torch.equal(rows[5], rows[:5].mean(0)), "padding"

    def test_the_fewest_rows_are_kept(self):
        models = [ModelReference.parse(name) for name in "ab"]
        tables = [torch.eye(3), torch.eye(5)[:, :3]]
        weight = SimpleNamespace(name="embed", vocabulary_axis=0)
        task = TruncatedVocabulary.model_construct(weight_info=weight)
        for rows in task.execute(dict(zip(models, tables, strict=True))).values():
            assert torch.equal(rows, torch.eye(3))


class TestCard:
    def test_it_is_asked_for_by_these_words_once_all_is_merged(self, pair, tmp_path, monkeypatch):
        """The recipe is the object that was planned, by which we know which merge it is."""
        import mergekit.merge

        asked = []

        def generate_card(**arguments):
            asked.append((arguments, (tmp_path / "out" / "model.safetensors").exists()))
            return "a card"

        monkeypatch.setattr(mergekit.merge, "generate_card", generate_card)
        config = MergeConfiguration.model_validate(
            recipe_of(*pair, method="linear", parameters={"weight": 1})
        )
        options = MergeOptions(quiet=True, copy_tokenizer=False)
        mergekit.merge.run_merge(config, str(tmp_path / "out"), options, config_source="text")
        ((arguments, merged),) = asked
        assert arguments == {"config": config, "config_yaml": "text", "name": "out"}
        assert arguments["config"] is config
        assert merged
        assert (tmp_path / "out" / "README.md").read_text() == "a card"

    def test_it_links_the_method_and_ends_in_the_recipe(self, tmp_path, monkeypatch):
        from mergekit.card import generate_card

        monkeypatch.chdir(tmp_path)
        for name in "ab":
            (tmp_path / name).mkdir()
        config = MergeConfiguration.model_validate(
            {"merge_method": "fisher", "models": [{"model": "./a"}, {"model": "./b"}]}
        )
        text = generate_card(config=config, config_yaml="the recipe", name="merged")
        assert "[Fisher-weighted averaging](https://arxiv.org/abs/2111.09832)" in text
        before, _, after = text.partition("\n### Configuration\n")
        assert "* ./a" in before
        assert "the recipe" in after

    def test_a_folder_of_two_parts_is_asked_for_on_the_hub(self, tmp_path, monkeypatch):
        from mergekit import card

        monkeypatch.chdir(tmp_path)
        (tmp_path / "org" / "model").mkdir(parents=True)
        asked = []
        monkeypatch.setattr("huggingface_hub.repo_exists", lambda n, **_: bool(asked.append(n)))
        assert not card.is_hf("org/model")
        assert asked == ["org/model"]
