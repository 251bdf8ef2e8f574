"""What is wrong with a recipe, as far as it alone tells: found before hours of measuring.

Both commands ask, `precompute` and `mergekit-yaml`, and are told everything at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

from mergekit._data import chat_templates
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration, OutputSliceDefinition

from fisher_mergekit.errors import nearest
from fisher_mergekit.recipe.calibration import home_problems
from fisher_mergekit.recipe.parameters import (
    exclude_patterns,
    parameter_blocks,
    parameter_problems,
)

DTYPES = ("float32", "float16", "bfloat16", "float64")
"""What a merge can be written in."""


def recipe_problems(config: MergeConfiguration) -> list[str]:
    """Return what is wrong with a recipe of ours, as the user wrote it."""
    _, problems = exclude_patterns(config)
    problems += parameter_problems(config)
    for models in _model_lists(config):
        problems += [
            f"{model} is listed twice in one merge; list it once, with the sum of its lambdas."
            for model in _repeated(models)
        ]
    problems += [
        f"{model} is twice in one slice, and mergekit tells inputs apart by their names only. To "
        "merge layers of one model with each other, spell its folder in two ways: "
        f"{model} and {str(model).rstrip('/')}/."
        for piece in slices_of(config)
        for model in _repeated([source.model for source in piece.sources])
    ]
    problems += [
        f"{model} is an adapter alone, which mergekit does not merge. Write the model that it was "
        f"trained on before it: MODEL+{model}."
        for model in dict.fromkeys(_all_models(config))
        if model.lora is None and _is_adapter(Path(model.model.path))
    ]
    for key in ("dtype", "out_dtype"):
        problems += _dtype_problems(key, getattr(config, key))
    problems += _template_problems(config.chat_template)
    if (config.parameters or {}).get("exclude") and config.base_model is None:
        problems.append(
            "`exclude:` takes the excluded tensors from base_model, and the recipe names none. "
            "Add `base_model:` at the top."
        )
    for block in parameter_blocks(config):
        for key in ("sidecar", "prior_sidecar"):
            problems += home_problems(key, block.parameters.get(key))
    return problems


def slices_of(config: MergeConfiguration) -> list[OutputSliceDefinition]:
    """Return the slices of a recipe and of its modules."""
    own = list(config.slices or [])
    return [*own, *(s for m in (config.modules or {}).values() for s in m.slices or ())]


def _model_lists(config: MergeConfiguration) -> list[list[ModelReference]]:
    lists = [config.models, *(module.models for module in (config.modules or {}).values())]
    return [[entry.model for entry in models] for models in lists if models]


def _all_models(config: MergeConfiguration) -> Iterator[ModelReference]:
    if config.base_model is not None:
        yield config.base_model
    for models in _model_lists(config):
        yield from models
    for piece in slices_of(config):
        yield from (source.model for source in piece.sources)


def _repeated(models: Sequence[ModelReference]) -> list[str]:
    return sorted({str(model) for model in models if models.count(model) > 1})


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").exists()


def _template_problems(name: str | None) -> list[str]:
    # mergekit finds it out when the model is written, and leaves it without a tokenizer.
    if not name or name == "auto" or (len(name) >= 20 and "{" in name):
        return []
    known = [file.name.removesuffix(".jinja") for file in files(chat_templates).iterdir()]
    known = sorted(word for word in known if not word.startswith("_"))
    if name in known:
        return []
    return [
        f"chat_template: {name!r} is neither auto, nor a template, nor one that mergekit has: "
        f"{', '.join(known)}.{nearest(name, known)}"
    ]


def _dtype_problems(key: str, name: str | None) -> list[str]:
    # mergekit also reads torch.float32, and writes a config.json that transformers cannot load.
    if name is None or name in DTYPES:
        return []
    return [f"{key}: {name!r} is not one of {', '.join(DTYPES)}."]
