"""Running merges: mergekit's own command in a process of its own, or mergekit in this one."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor, Task
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from models import Tensors, read

from fisher_mergekit import startup

startup.start()  # in this process, also where the start-up file is not installed

_SCRIPTS = {
    "mergekit-yaml": "mergekit.scripts.run_yaml",
    "mergekit-multi": "mergekit.scripts.multimerge",
    "mergekit-legacy": "mergekit.scripts.legacy",
    "mergekit-pytorch": "mergekit.scripts.merge_raw_pytorch",
    "mergekit-fisher": "fisher_mergekit.cli",
}
_FROM_SOURCE = "from fisher_mergekit import startup; startup.start(); from {} import main; main()"


def command(
    script: str, *arguments: object, given: str | None = None, **environment: object
) -> subprocess.CompletedProcess[str]:
    """Run one of mergekit's commands or ours, plain where the package is installed.

    Args:
        given: what comes through a pipe.
        environment: variables of the process beside this one's; offline, unless they say so.
    """
    if (Path(sysconfig.get_path("purelib")) / "fisher_mergekit.pth").exists():
        start = [str(Path(sys.executable).with_name(script))]
    else:
        start = [sys.executable, "-c", _FROM_SOURCE.format(_SCRIPTS[script])]
    return subprocess.run(
        [*start, *map(str, arguments)],
        input=given,
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **{k: str(v) for k, v in environment.items()}},
    )


def mergekit_yaml(
    recipe: dict, folder: Path, *flags: str
) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Write the recipe and run mergekit-yaml on it; return what it said, and the output folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path, out = folder / "recipe.yml", folder / "out"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return command("mergekit-yaml", path, out, "--quiet", *flags), out


def merged(recipe: dict, out: Path, **options: object) -> Tensors:
    """Run a merge in this process and return its tensors."""
    defaults = {"copy_tokenizer": False, "write_model_card": False, "quiet": True}
    run_merge(
        MergeConfiguration.model_validate(recipe),
        str(out),
        MergeOptions.model_validate({**defaults, **options}),
    )
    return read(out)


def planned(recipe: dict, **options: object) -> list[Task]:
    """Plan a merge that stays in memory; return its tasks."""
    config = MergeConfiguration.model_validate(recipe)
    chosen = MergeOptions.model_validate(options)
    LoaderCache().setup(chosen)
    info = get_architecture_info(config, chosen)
    first = config.base_model or config.referenced_models()[0]
    return MergePlanner(config, info, chosen, first.config()).plan_in_memory()


def scheduled(tasks: Sequence[Task]) -> list[Task]:
    """Return all tasks in the order in which mergekit runs them."""
    return [handle.task() for handle in Executor(tasks, "cpu", "cpu").schedule.tasks]


def run_planned(tasks: Sequence[Task]) -> Tensors:
    """Run planned tasks and return the tensors of the model that they make."""
    done = Executor(tasks).run(quiet=True)
    return {task.weight_info.name: tensor for task, tensor in done}


def assert_close(found: Tensors, expected: Tensors, **tolerance: float) -> None:
    """Compare tensor by tensor; the names must be the same too."""
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name].double(),
            tensor.double(),
            msg=lambda m, name=name: f"{name}: {m}",
            **(tolerance or {"rtol": 1e-5, "atol": 1e-5}),
        )


def recipe_of(*models: Path, method: str = "fisher", dtype: str = "float32", **top: object) -> dict:
    """Return a recipe that lists the models; `lambdas` gives each its own."""
    lambdas = top.pop("lambdas", None)
    entries = [{"model": str(m)} for m in models]
    if lambdas is not None:
        for entry, value in zip(entries, lambdas, strict=True):
            entry["parameters"] = {"lambda": value}
    content = {"merge_method": method, "models": entries, "dtype": dtype, **top}
    return {key: value for key, value in content.items() if value is not None}
