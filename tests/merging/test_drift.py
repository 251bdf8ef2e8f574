"""What we rely on in mergekit: a new version of it should fail here first, with words.

Names, signatures and fields are lists; behaviours are tests, each on mergekit's own code alone.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import mergekit
import pytest
import torch
from mergekit import merge_methods
from mergekit.architecture import ModelArchitecture, WeightInfo, get_architecture_info
from mergekit.common import ModelPath, ModelReference, dtype_from_name
from mergekit.config import (
    ConfigReader,
    InputModelDefinition,
    InputSliceDefinition,
    MergeConfiguration,
    OutputModuleDefinition,
    OutputSliceDefinition,
)
from mergekit.graph import Executor, Task
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods.base import (
    InputContract,
    MergeMethod,
    MergeMethodSpec,
    ParameterScope,
    ParameterSpec,
)
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

import fisher_mergekit

PACKAGE = Path(fisher_mergekit.__file__).parent

NAMES = {
    "mergekit.architecture": {
        "ModelArchitecture": "which tensors a model of an architecture has",
        "WeightInfo": "what a tensor is called in a model, and whether it may be missing",
        "arch_info_for_config": "the description of the output, where architectures are mixed",
    },
    "mergekit.card": {"is_hf": "whether a path is linked to the Hub; asked for each model"},
    "mergekit.common": {
        "ModelPath": "a path or Hub name, and its revision",
        "ModelReference": "a model of a recipe, perhaps with an adapter",
        "dtype_from_name": "what `dtype:` means",
        "get_config_value": "a value of a model's configuration, such as how many layers it has",
        "set_config_value": "sets one, as mergekit does after a merge",
    },
    "mergekit.config": {
        "ConditionalParameter": "one entry of a list of filters",
        "ConfigReader": "the settings that hold for one output tensor",
        "InputModelDefinition": "its keys beside `model`, to know others by",
        "InputSliceDefinition": "likewise, in a slice",
        "MergeConfiguration": "the recipe",
        "OutputModuleDefinition": "one module of the output, in slices",
        "OutputSliceDefinition": "some layers of the output, and which layers they come from",
    },
    "mergekit.graph": {"Task": "a node of the graph; ours are subclasses"},
    "mergekit.io.tasks": {"LoaderCache": "where a model's files are"},
    "mergekit.merge": {
        "generate_card": "the function whose result is written as README.md; we wrap it here",
        "run_merge": "one merge, in mergekit-yaml and in each stage of mergekit-multi",
    },
    "mergekit.merge_methods": {
        "get": "the door through which methods are asked for",
        "register": "adds a method by name",
        "registered_methods": "those that are known",
    },
    "mergekit.merge_methods.base": {
        "InputContract": "which inputs a method takes",
        "MergeMethod": "the class of what is registered",
        "MergeMethodSpec": "name, parameters and reference of a method",
        "ParameterScope": "whether a parameter is a model's or the recipe's",
        "ParameterSpec": "one parameter",
        "TensorGroup": "what a kernel would get",
    },
    "mergekit.options": {
        "MergeOptions": "the flags of the command",
        "ShardSizeParamType": "sizes such as 5B, on the command line",
    },
    "mergekit.parameter_resolver": {"resolve_parameter": "one setting for one tensor"},
    "mergekit.plan": {"MergePlanner": "walks over the tensors; `_plan` is the one method we wrap"},
    "mergekit.tokenizer": {
        "BuildTokenizer": "builds the output's tokenizer; we build it in planning",
        "PermutedVocabulary": "brings the models' rows of tokens in one order",
        "TokenizerInfo": "the tokenizer, and which row each model has of a token",
    },
    "mergekit.tokenizer.build": {
        "get_stripped_tokenizer": "base_model's tokenizer, before tokens are added to it"
    },
    "mergekit.tokenizer.config": {
        "ModelTokenEmbedding": "a token's row is that of another token",
        "TokenEmbeddingConfig": "what a recipe says of one token",
        "TokenizerConfig": "the keys of `tokenizer:`, to know misspelt ones by",
        "ZeroEmbedding": "a token's row is zero",
    },
    "mergekit.tokenizer.truncate": {"TruncatedVocabulary": "cuts rows to the fewest"},
    "mergekit.scripts.multimerge": {"main": "the command; its function's module tells it is run"},
}
"""By module, each name and what we need it for."""

FIELDS = {
    InputModelDefinition: "model parameters",
    InputSliceDefinition: "model layer_range parameters",
    MergeConfiguration: (
        "merge_method base_model models slices modules parameters dtype out_dtype "
        "tokenizer_source tokenizer"
    ),
    MergeOptions: (
        "allow_crimes copy_tokenizer device lora_merge_cache lora_merge_dtype multi_gpu "
        "out_shard_size quiet random_seed read_to_gpu transformers_cache trust_remote_code "
        "unsafe_truncate_embeddings write_model_card"
    ),
    BuildTokenizer: "base_model referenced_models tokenizer_source add_tokens",
    ModelPath: "path revision",
    ModelReference: "model lora",
    OutputModuleDefinition: "models slices parameters",
    OutputSliceDefinition: "sources base_model parameters",
    PermutedVocabulary: (
        "gather_tensors tokenizer_task tokens pad_to_multiple_of base_model vocabulary_axis"
    ),
    TokenEmbeddingConfig: "source force",
    TruncatedVocabulary: "gather_tensors weight_info",
    WeightInfo: "name aliases tied_names optional force_dtype vocabulary_axis",
}
"""Fields that we read, by class."""

CALLS = [
    (MergePlanner._plan, "self"),
    (MergePlanner.plan_tensor, "self weight weights_in models cfg_reader"),
    (MergePlanner.normalize_config, "self"),
    (MergePlanner.plan_to_disk, "self out_path"),
    (MergePlanner.plan_in_memory, "self"),
    (ConfigReader.parameter_sources, "self model"),
    (resolve_parameter, "parameter settings tensor_name t model"),
    (LoaderCache.get, "self model"),
    (LoaderCache.setup, "self options"),
    (ModelReference.config, "self trust_remote_code"),
    (ModelReference.local_path, "self cache_dir"),
    (ModelReference.merged, "self cache_dir trust_remote_code lora_merge_dtype"),
    (ModelArchitecture.all_weights, "self config"),
    (ParameterSpec, "name value_type scope default"),
    (MergeMethodSpec, "name parameters contract pretty_name reference_url"),
    (merge_methods.register, "method"),
    (merge_methods.get, "name"),
    (get_architecture_info, "config options"),
]
"""Functions that we call, or that are called in our place, and the arguments by name."""


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


class TestNames:
    @pytest.mark.parametrize(
        ("module", "name", "why"),
        [(module, name, why) for module, names in NAMES.items() for name, why in names.items()],
    )
    def test_it_is_there(self, module, name, why):
        found = importlib.import_module(module)
        assert hasattr(found, name), f"mergekit has no {module}.{name} any more: {why}"

    def test_the_list_is_whole(self):
        used = set()
        for path in PACKAGE.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mergekit"):
                    used |= {(node.module, alias.name) for alias in node.names}
        listed = {(module, name) for module, names in NAMES.items() for name in names}
        modules = {tuple(module.rsplit(".", 1)) for module in NAMES}
        new = used - listed - modules
        assert not new, f"Say in NAMES what we need of mergekit, and what for: {sorted(new)}"

    @pytest.mark.parametrize(
        ("owner", "names"), FIELDS.items(), ids=lambda x: getattr(x, "__name__", "")
    )
    def test_fields(self, owner, names):
        lost = set(names.split()) - set(owner.model_fields)
        assert not lost, f"mergekit's {owner.__name__} has no {', '.join(sorted(lost))} any more"

    @pytest.mark.parametrize(("function", "names"), CALLS, ids=lambda x: getattr(x, "__name__", ""))
    def test_signatures(self, function, names):
        parameters = inspect.signature(function).parameters
        lost = set(names.split()) - set(parameters)
        assert not lost, f"{function.__qualname__} takes no {', '.join(sorted(lost))} any more"
        needed = {
            name
            for name, p in parameters.items()
            if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        }
        new = needed - set(names.split())
        assert not new, f"{function.__qualname__} also wants {', '.join(sorted(new))} now"

    @pytest.mark.parametrize("script", [run_yaml, multimerge])
    def test_commands_are_known_by_their_modules_and_what_was_typed_by_its_name(self, script):
        assert script.main.callback.__module__ == script.__name__
        assert "config_file" in [parameter.name for parameter in script.main.params]

    def test_the_folder_of_a_model_with_an_adapter(self, tmp_path, monkeypatch):
        """Of what is there already nothing is made anew."""
        pair = ModelReference.model_validate("org/base@v1+org/adapter")
        made = tmp_path / f"{pair.model._unique_id()}_{pair.lora._unique_id()}"
        made.mkdir()
        assert pair.merged(cache_dir=str(tmp_path)).model.path == str(made)

    def test_kernels_that_we_override(self):
        for name in ("__call__", "_execute", "_execute_resolved"):
            assert callable(getattr(MergeMethod, name)), name
        assert MergeMethod.__abstractmethods__ <= {"_execute"}

    def test_tasks_that_we_subclass(self):
        assert Task.__abstractmethods__ == {"arguments", "execute"}
        for name in ("priority", "group_label", "uses_accelerator"):
            assert callable(getattr(Task, name)), name

    def test_parts_of_a_loader(self, pair):
        loader = LoaderCache().get(ModelReference.model_validate(str(pair[0])))
        assert Path(loader.index.base_path) == pair[0]


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
