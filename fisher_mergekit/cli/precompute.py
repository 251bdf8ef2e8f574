"""`mergekit-fisher precompute`: measure models and write their sidecars."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import click
from mergekit.common import ModelReference
from tqdm import tqdm

from fisher_mergekit.cli.local import Storage, find
from fisher_mergekit.cli.options import Choices, ShardSize, add_common_options, apply_common_options
from fisher_mergekit.errors import (
    FisherMergekitError,
    MeasureError,
    PlanningError,
    RecipeError,
)
from fisher_mergekit.measure.job import Job, missing_kinds
from fisher_mergekit.measure.precompute import precompute as measure
from fisher_mergekit.measure.precompute import prepare
from fisher_mergekit.measure.sources import Prepared
from fisher_mergekit.recipe import (
    Attention,
    Calibration,
    Dtype,
    Estimator,
    Kind,
    SidecarDtype,
    Unit,
    read_calibration,
    read_recipe,
)
from fisher_mergekit.shell import flags, word
from fisher_mergekit.sidecar.location import holding
from fisher_mergekit.sidecar.page import what_was_read

_REPEATED = ("text", "choices")
_CALIBRATION_FLAGS = (
    ("--path", "path", str, "Calibration data: a local file or a `datasets` name."),
    ("--name", "name", str, "Configuration of the data set."),
    ("--split", "split", str, "Split of the data set.  [default: train]"),
    ("--text", "text", str, "Text column; give it twice for a pair."),
    ("--messages", "messages", str, "Chat column."),
    ("--image", "image", str, "Column of pictures."),
    ("--choices", "choices", str, "Column of lists of choices; or give it once for each choice."),
    ("--label", "label", str, "Label column."),
    ("--optimizer", "optimizer", str,
     "Instead of data: a training's optimizer.pt, or its folder; Adam's second moment is taken."),
    ("--estimator", "estimator", click.Choice(get_args(Estimator)),
     "Where y comes from.  [default: exact where an example has one label, several or a number, "
     "sampled where it has many places: token classes, answers, language]"),
    ("--unit", "unit", click.Choice(get_args(Unit)), "Whose gradient is squared whole."),
    ("--examples", "examples", int, "Use the first N examples.  [default: 4096]"),
    ("--max-length", "max_length", int, "Cut examples to this many tokens.  [default: 512]"),
    ("--batch-size", "batch_size", str,
     "Examples, or auto; changes speed and memory only.  [default: auto]"),
    ("--attn-implementation", "attn_implementation", click.Choice(get_args(Attention)),
     "How to compute attention.  [default: transformers' choice]"),
    ("--dtype", "dtype", click.Choice(get_args(Dtype)),
     "Compute in this dtype.  [default: float32]"),
    ("--sidecar-dtype", "sidecar_dtype", click.Choice(get_args(SidecarDtype)),
     "Write in this dtype.  [default: float32]"),
)  # fmt: skip


def _add_calibration_flags(command: Any) -> Any:
    for flag, key, value_type, text in reversed(_CALIBRATION_FLAGS):
        command = click.option(flag, key, type=value_type, help=text, multiple=key in _REPEATED)(
            command
        )
    command = click.option("--shuffle/--no-shuffle", default=None, help="Draw the examples.")(
        command
    )
    command = click.option(
        "--gradient-checkpointing/--no-gradient-checkpointing",
        default=None,
        help="Keep fewer activations, and compute them twice.",
    )(command)
    return click.option(
        "--mask-prompt/--no-mask-prompt", default=None, help="Language models: score no prompt."
    )(command)


@click.command(
    epilog="""\b
Examples:
  mergekit-fisher precompute recipe.yml
  mergekit-fisher precompute recipe.yml --examples 256 --force
  mergekit-fisher precompute --model ./rte --path rte.jsonl --text premise --text hypothesis
  mergekit-fisher precompute --model ./run/checkpoint-500 --optimizer ./run/checkpoint-500
"""
)
@click.argument("recipe", type=click.Path(path_type=Path), required=False)
@click.option("--model", help="Measure this one model; with a recipe, only this one of its models.")
@click.option("--out", type=click.Path(path_type=Path), help="Sidecar folder, with --model.")
@click.option(
    "--kind", "kinds", type=Choices(get_args(Kind)),
    help=f"What to measure, of {', '.join(get_args(Kind))}; several with commas, in one pass.",
)  # fmt: skip
@_add_calibration_flags
@click.option("--force", is_flag=True, help="Measure again what has a valid sidecar.")
@click.option("--device", default="cpu", show_default=True, help="Device to compute on, or auto.")
@click.option("--cuda", is_flag=True, help="Same as --device cuda.")
@click.option("--random-seed", type=int, help="Seed of draws and shuffling.  [default: 0]")
@click.option(
    "--trust-remote-code", is_flag=True, help="Run code that comes with a model (danger)."
)
@click.option("--transformers-cache", help="Override storage path for downloaded models.")
@click.option("--lora-merge-cache", help="Folder for models with a LoRA adapter merged into them.")
@click.option(
    "--lora-merge-dtype",
    type=click.Choice(["float32", "bfloat16", "float16", "float64"]),
    help="Load a model in this dtype before its adapter is merged.",
)
@click.option(
    "--out-shard-size", type=ShardSize(), default="5B", show_default=True,
    help="Largest file to write, in bytes, as mergekit counts it.",
)  # fmt: skip
@add_common_options
def precompute(
    recipe: Path | None,
    model: str | None,
    out: Path | None,
    kinds: tuple[str, ...] | None,
    force: bool,
    device: str,
    cuda: bool,
    random_seed: int | None,
    trust_remote_code: bool,
    transformers_cache: str | None,
    lora_merge_cache: str | None,
    lora_merge_dtype: str | None,
    out_shard_size: int,
    verbosity: int,
    quiet: bool,
    num_threads: int | None,
    **given_flags: Any,
) -> None:
    """Measure every model of RECIPE that has no valid sidecar yet, and is not only copied.

    Without a recipe, measure one model: --model M --path DATA --text COLUMN. Flags override
    the recipe.
    """
    apply_common_options(verbosity, quiet, num_threads)
    start = time.perf_counter()
    overrides = _overrides(given_flags, random_seed)
    options: dict[str, Any] = {
        "device": _device(device, cuda),
        "trust_remote_code": trust_remote_code,
        "shard_size": out_shard_size,
    }
    storage = Storage(transformers_cache, lora_merge_cache, lora_merge_dtype, trust_remote_code)
    valid: list[Job] = []
    waiting: list[Prepared] = []
    problems: list[str] = []
    requests = _requests(recipe, model, out, overrides, quiet=quiet)
    for reference, given, default_kinds, calibration in requests:
        is_pair = reference.lora is not None
        try:
            local = find(reference, storage)
            job = Job(
                reference=str(reference) if is_pair else reference.model.path,
                revision=None if is_pair else reference.model.revision,
                folder=local.folder,
                tokenizer=local.tokenizer,
                base=local.base,
                present=(given,) if given else local.present,
                out=given or local.out,
                kinds=kinds or default_kinds,
                calibration=calibration,
                **options,
            )
            missing = job.kinds if force else missing_kinds(job)
            if missing:
                waiting.append(prepare(replace(job, kinds=missing)))
            else:
                valid.append(job)
        except FisherMergekitError as error:
            problems.append(f"{reference}: {error.message}")
    problems += _same_place([prepared.job for prepared in waiting])
    if problems:  # all of them, before the first model is measured
        raise PlanningError(problems)
    for job in valid:
        if not quiet:
            places = dict.fromkeys(str(holding(job.present, kind)) for kind in job.kinds)
            click.echo(f"{job.reference}: {' and '.join(places)} is valid, nothing to measure.")
    for prepared in waiting:
        job = prepared.job
        with _ProgressBar(f"Measuring {job.reference}", quiet) as progress:
            try:
                header = measure(prepared, progress)
            except FisherMergekitError as error:
                raise MeasureError(f"{job.reference}: {error.message}") from error
        if not quiet:
            read = what_was_read(header.kinds[job.kinds[0]])
            click.echo(f"{job.reference}: read {read}, wrote {job.out}")
    if not quiet:
        jobs = [*valid, *(prepared.job for prepared in waiting)]
        _summary(recipe, jobs, len(waiting), time.perf_counter() - start, storage)


class _ProgressBar:
    """A tqdm bar that appears when the total is known: after the model has been loaded."""

    def __init__(self, title: str, quiet: bool):
        self._title, self._quiet = title, quiet
        self._bar: Any = None

    def __enter__(self) -> _ProgressBar:
        return self

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = tqdm(desc=self._title, total=total, unit="example", disable=self._quiet)
        self._bar.update(done)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _overrides(flagged: dict[str, Any], seed: int | None) -> dict[str, Any]:
    """Return the calibration keys that were given as flags."""
    given = {key: value for key, value in flagged.items() if value is not None and value != ()}
    for key in _REPEATED:
        if key in given:
            columns = given[key]
            given[key] = columns[0] if len(columns) == 1 else list(columns)
    if seed is not None:
        given["seed"] = seed
    return given


def _requests(
    recipe_path: Path | None,
    model: str | None,
    out: Path | None,
    overrides: dict[str, Any],
    *,
    quiet: bool,
) -> list[tuple[ModelReference, Path | None, tuple[str, ...], Calibration]]:
    """Return (model, sidecar if named, kinds, calibration) of everything that is asked for."""
    if recipe_path is None:
        if model is None:
            raise RecipeError(
                "give a recipe, or one model: --model MODEL --path DATA --text COLUMN"
            )
        try:
            reference = ModelReference.parse(model)
        except RuntimeError as error:
            raise RecipeError(
                f"--model {model}: {error}. A model is written MODEL, MODEL@REVISION or "
                "MODEL+ADAPTER."
            ) from None
        return [(reference, out, ("fisher",), read_calibration(overrides, where="flags"))]
    recipe = read_recipe(recipe_path)
    if model is None:
        chosen = [entry for entry in recipe.models if not entry.is_copied]
        for entry in recipe.models:
            if entry.is_copied and not quiet:
                click.echo(f"{entry.reference} is only copied, nothing to measure.")
    else:
        spelt = (model, model.rstrip("/"))
        chosen = [entry for entry in recipe.models if str(entry.reference) in spelt]
        if not chosen:
            names = ", ".join(str(entry.reference) for entry in recipe.models)
            raise RecipeError(f"{recipe_path} has no model {model!r}; it has {names}.")
    if out is not None and len(chosen) > 1:
        raise RecipeError("--out is the folder of one sidecar: name the model too, --model MODEL.")
    if "optimizer" in overrides and len(chosen) > 1:
        raise RecipeError("--optimizer is of one model: name the model too, --model MODEL.")
    requests = []
    for entry in chosen:
        calibration = read_calibration(
            entry.calibration.model_dump(exclude_unset=True), overrides, where="flags"
        )
        requests.append((entry.reference, out or entry.sidecar, recipe.kinds, calibration))
    return requests


def _same_place(jobs: list[Job]) -> list[str]:
    """Say which models would write over each other's sidecar."""
    models: dict[Path, list[str]] = {}
    for job in jobs:
        models.setdefault(job.out.resolve(), []).append(job.reference)
    return [
        f"{' and '.join(names)} would both be written to {place}. Give each its own `sidecar:`."
        for place, names in models.items()
        if len(names) > 1
    ]


def _device(device: str, cuda: bool) -> str:
    import torch

    if cuda:
        device = "cuda"
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator()
        return str(accelerator) if accelerator is not None else "cpu"
    try:
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".") + "."
        raise RecipeError(
            f"device {device!r} cannot be used here: {reason} Try --device cpu."
        ) from None
    return device


def _summary(
    recipe: Path | None, jobs: list[Job], measured: int, seconds: float, storage: Storage
) -> None:
    click.echo(f"Measured {measured} of {len(jobs)} models in {seconds:.1f} s.")
    if recipe is not None:
        given = {
            "--lora-merge-cache": storage.lora_merge_cache,
            "--lora-merge-dtype": storage.lora_merge_dtype,
            "--transformers-cache": storage.transformers_cache,
            "--trust-remote-code": storage.trust_remote_code,
        }
        click.echo(f"Next: mergekit-yaml {word(recipe)} merged/{flags(given)}")
    else:
        place = jobs[0].out if measured else holding(jobs[0].present, jobs[0].kinds[0])
        click.echo(f"Next: mergekit-fisher inspect {word(place)}")
