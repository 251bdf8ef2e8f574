"""Names, signatures and fields of mergekit that we rely on: a new version of it should fail here.

Each is written as text and looked up by its test, so that what is missing is told with words. What
mergekit does with them is in `test_behaviours.py`.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from pkgutil import resolve_name

import pytest

import fisher_mergekit

PACKAGE = Path(fisher_mergekit.__file__).parent

NAMES = {
    "mergekit._data": {"chat_templates": "the templates that a recipe can name"},
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
    "mergekit.architecture:ModelArchitecture": "architectures modules vocab_size_config_key",
    "mergekit.architecture:WeightInfo": (
        "name aliases tied_names optional force_dtype vocabulary_axis"
    ),
    "mergekit.common:ModelPath": "path revision",
    "mergekit.common:ModelReference": "model lora",
    "mergekit.config:ConfigReader": "config module slice_out t",
    "mergekit.config:InputModelDefinition": "model parameters",
    "mergekit.config:InputSliceDefinition": "model layer_range parameters",
    "mergekit.config:MergeConfiguration": (
        "merge_method base_model models slices modules parameters dtype out_dtype "
        "tokenizer_source tokenizer"
    ),
    "mergekit.config:OutputModuleDefinition": "models slices parameters",
    "mergekit.config:OutputSliceDefinition": "sources base_model parameters",
    "mergekit.options:MergeOptions": (
        "allow_crimes copy_tokenizer device lora_merge_cache lora_merge_dtype multi_gpu "
        "out_shard_size quiet random_seed read_to_gpu transformers_cache trust_remote_code "
        "unsafe_truncate_embeddings write_model_card"
    ),
    "mergekit.tokenizer:BuildTokenizer": (
        "base_model referenced_models tokenizer_source add_tokens trust_remote_code"
    ),
    "mergekit.tokenizer:PermutedVocabulary": (
        "gather_tensors tokenizer_task tokens pad_to_multiple_of base_model vocabulary_axis"
    ),
    "mergekit.tokenizer.config:ModelTokenEmbedding": "model token token_id",
    "mergekit.tokenizer.config:TokenEmbeddingConfig": "source force",
    "mergekit.tokenizer.config:TokenizerConfig": "source tokens pad_to_multiple_of",
    "mergekit.tokenizer.truncate:TruncatedVocabulary": "gather_tensors weight_info",
}
"""Fields that we read, by class."""

CALLS = {
    "mergekit.architecture:ModelArchitecture.all_weights": "self config",
    "mergekit.architecture:get_architecture_info": "config options",
    "mergekit.architecture.base:ModuleArchitecture.num_layers": "self config",
    "mergekit.architecture.base:ModuleArchitecture.num_layers_config_key": "self",
    "mergekit.common:ModelReference.config": "self trust_remote_code",
    "mergekit.common:ModelReference.local_path": "self cache_dir",
    "mergekit.common:ModelReference.merged": "self cache_dir trust_remote_code lora_merge_dtype",
    "mergekit.config:ConfigReader.base_model.fget": "self",
    "mergekit.config:ConfigReader.parameter_sources": "self model",
    "mergekit.io.tasks:LoaderCache.get": "self model",
    "mergekit.io.tasks:LoaderCache.setup": "self options",
    "mergekit.merge_methods:get": "name",
    "mergekit.merge_methods:register": "method",
    "mergekit.merge_methods.base:MergeMethodSpec": (
        "name parameters contract pretty_name reference_url"
    ),
    "mergekit.merge_methods.base:ParameterSpec": "name value_type scope default",
    "mergekit.parameter_resolver:resolve_parameter": "parameter settings tensor_name t model",
    "mergekit.plan:MergePlanner._plan": "self",
    "mergekit.plan:MergePlanner.normalize_config": "self",
    "mergekit.plan:MergePlanner.plan_in_memory": "self",
    "mergekit.plan:MergePlanner.plan_tensor": "self weight weights_in models cfg_reader",
    "mergekit.plan:MergePlanner.plan_to_disk": "self out_path",
    "mergekit.tokenizer:PermutedVocabulary.execute": "self tokenizer_info tensors",
    "mergekit.tokenizer.truncate:TruncatedVocabulary.execute": "self tensors",
}
"""Functions that we call, or that are called in our place, and the arguments by name."""

ABSTRACT = {
    "mergekit.graph:Task": "arguments execute",
    "mergekit.merge_methods.base:MergeMethod": "_execute",
}
"""What must be overridden in the classes that ours are subclasses of."""

OVERRIDDEN = {
    "mergekit.graph:Task": "priority group_label uses_accelerator",
    "mergekit.merge_methods.base:MergeMethod": ("__call__ _execute_resolved validate_inputs"),
}
"""What else we override there."""


def looked_up(path, why):
    try:
        return resolve_name(path)
    except (ImportError, AttributeError):
        pytest.fail(f"mergekit has no {path} any more: {why}")


@pytest.mark.parametrize(
    ("module", "name", "why"),
    [(module, name, why) for module, names in NAMES.items() for name, why in names.items()],
)
def test_names(module, name, why):
    looked_up(f"{module}:{name}", why)


def test_the_list_of_names_is_whole():
    used = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mergekit"):
                used |= {(node.module, alias.name) for alias in node.names}
    listed = {(module, name) for module, names in NAMES.items() for name in names}
    modules = {tuple(module.rsplit(".", 1)) for module in NAMES}
    new = used - listed - modules
    assert not new, f"Say in NAMES what we need of mergekit, and what for: {sorted(new)}"


@pytest.mark.parametrize(("owner", "names"), FIELDS.items())
def test_fields(owner, names):
    lost = set(names.split()) - set(looked_up(owner, f"we read {names}").model_fields)
    assert not lost, f"mergekit's {owner} has no {', '.join(sorted(lost))} any more"


@pytest.mark.parametrize(("function", "names"), CALLS.items())
def test_signatures(function, names):
    parameters = inspect.signature(looked_up(function, f"it took {names}")).parameters
    lost = set(names.split()) - set(parameters)
    assert not lost, f"{function} takes no {', '.join(sorted(lost))} any more"
    needed = {
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }
    new = needed - set(names.split())
    assert not new, f"{function} also wants {', '.join(sorted(new))} now"


@pytest.mark.parametrize(("owner", "names"), ABSTRACT.items())
def test_what_must_be_overridden(owner, names):
    base = looked_up(owner, "ours are subclasses")
    new = base.__abstractmethods__ - set(names.split())
    assert not new, f"subclasses of {owner} must have {', '.join(sorted(new))}, too"


@pytest.mark.parametrize(("owner", "names"), OVERRIDDEN.items())
def test_what_else_is_overridden(owner, names):
    base = looked_up(owner, "ours are subclasses")
    lost = [name for name in names.split() if not callable(getattr(base, name, None))]
    assert not lost, f"{owner} has no {', '.join(lost)} any more"
