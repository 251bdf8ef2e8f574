"""One architecture, from its checkpoint to a merge of two: what the table in the docs reports.

    two tiny models, saved by transformers
    -> measured by the package
       == the per-example loop over all parameters, in float64
       and the factors of its linear layers
       == what its matrices multiply (`factors.py`)
    -> written, and read back under the names of the checkpoint files
    -> merged by mergekit-yaml
       == Σ λ F θ / Σ λ F by hand
    -> loaded by transformers
       == what was merged

The loop knows the names in memory only. Which name in the files is which of them, and how packed
tensors are cut, is asked of transformers itself: a model whose *weights are the Fishers* is saved,
and the files say where each went. Likewise what mergekit wrote, in whatever layout, is loaded and
saved again, and then stands under the names of the models' files.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import merge_oracle
import oracles
import torch
import transformers
import yaml
from architectures import factors, zoo
from architectures.inputs import LENGTHS, example, save_tokenizer, write_data
from click import Command
from click.testing import CliRunner
from mergekit.scripts.run_yaml import main as mergekit_yaml
from models import Tensors, read
from running import recipe_of
from torch import Tensor, nn

from fisher_mergekit.cli import main as mergekit_fisher
from fisher_mergekit.errors import MeasureError
from fisher_mergekit.measure.batches import Batch, Example
from fisher_mergekit.measure.job import Job
from fisher_mergekit.measure.likelihoods import likelihood_for
from fisher_mergekit.measure.precompute import precompute, prepare
from fisher_mergekit.measure.sources.data import PreparedData
from fisher_mergekit.measure.subject import check_tensors, read_config
from fisher_mergekit.recipe import Calibration
from fisher_mergekit.sidecar.checkpoint import Checkpoint
from fisher_mergekit.sidecar.reader import Sidecar

TOLERANCE = 1e-5
"""Largest relative error of a measured tensor."""

NOISE = 1e-12
"""What counts as zero, as in `oracles.assert_same_fishers`."""

LAMBDAS = (0.3, 0.7)
BATCH_SIZE = 3


class Refused(Exception):
    """The package, or mergekit, does not do it; its own words."""


@dataclass
class Report:
    """What was found of one architecture.

    Attributes:
        error: worst relative error of a measured tensor; None if nothing was measured.
        factors: the same of the factors of linear layers, and what has none.
        loose: parameters measured one example at a time, and why.
        alone: why factors were measured one example at a time, if they were.
        is_merged: whether a merge came out, right.
        refusal: why it is not measured, or not merged, in the package's own words.
    """

    error: float | None = None
    factors: factors.Found | None = None
    alone: str = ""
    loose: dict[str, str] = field(default_factory=dict)
    is_merged: bool = False
    refusal: str = ""


def check(architecture: str, folder: Path) -> Report:
    """Measure and merge two models of an architecture in an empty folder.

    Raises:
        AssertionError: a number, a name or a shape is not what it should be.
    """
    report = Report()
    models = [folder / "a", folder / "b"]
    fishers = []
    try:
        for seed, model in enumerate(models):
            zoo.save(architecture, model, seed)
            kinds = ("fisher",) if seed else ("fisher", "gram", "kfac")
            with _noted(report):
                examples = measure(architecture, model, kinds)
            fishers.append(sidecar_of(model))
            if seed == 0:
                report.error = _compared(architecture, model, examples, fishers[0])
                report.factors = factors.compare(load(architecture, model), model, examples)
                assert report.factors.error <= TOLERANCE
                measure(architecture, model, ("gram",), model / "alone")
                factors.assert_same_alone(model, model / "alone")
        out = merged(folder, *models)
    except Refused as refused:
        report.refusal = str(refused)
        return report
    _assert_merged(architecture, out, [read(model) for model in models], fishers)
    report.is_merged = True
    return report


def measure(
    architecture: str, folder: Path, kinds: Sequence[str], out: Path | None = None
) -> list[Example]:
    """Measure a model, into its own folder or another; return the examples it was measured on.

    Raises:
        Refused: the package does not measure it.
    """
    save_tokenizer(architecture, folder)
    flags: dict[str, Any] = {**write_data(architecture, folder), "batch_size": BATCH_SIZE}
    job = Job(
        reference=str(folder),
        revision=None,
        folder=folder,
        tokenizer=folder,
        present=(out or folder / "sidecar",),
        out=out or folder / "sidecar",
        kinds=tuple(kinds),
        calibration=Calibration.model_validate(flags),
    )
    if example(architecture, 0) is not None:
        prepared = _prepared(architecture, job)
        try:
            precompute(prepared)
        except MeasureError as error:
            raise Refused(str(error)) from error
        return prepared.examples
    words = ["precompute", "--quiet", "--model", str(folder), "--out", str(job.out)]
    words += ["--kind", ",".join(kinds)]
    for key, values in flags.items():
        for value in values if isinstance(values, list) else [values]:
            words += [f"--{key.replace('_', '-')}", str(value)]
    _run(mergekit_fisher, words)
    return prepare(job).examples


def _prepared(architecture: str, job: Job) -> PreparedData:
    """Prepare what the command cannot read yet."""
    checkpoint = Checkpoint(job.folder)
    config, _ = read_config(job.folder)
    likelihood = likelihood_for(architecture, config)
    check_tensors(config, architecture, checkpoint)
    examples = [example(architecture, number) for number in range(len(LENGTHS))]
    return PreparedData(job, likelihood, likelihood.default_estimator, examples)


def _run(command: Command, words: Sequence[str]) -> None:
    """Run a command in this process.

    Raises:
        Refused: it ended with a message; any other exception is the tests' own.
    """
    result = CliRunner().invoke(command, words)
    if result.exit_code != 0:
        if not isinstance(result.exception, SystemExit):
            raise result.exception
        raise Refused(" ".join(result.output.split()))


@contextmanager
def _noted(report: Report) -> Iterator[None]:
    """Note what is said to be measured one example at a time, and why."""

    class Note(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if str(record.msg).startswith("Factors are measured one example at a time"):
                (report.alone,) = map(str, record.args)
            elif "one example at a time" in str(record.msg):
                name, reason = record.args
                report.loose[str(name)] = str(reason)

    logger, handler = logging.getLogger("fisher_mergekit.measure"), Note(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def sidecar_of(folder: Path) -> Tensors:
    """Load what was written, under the names of the checkpoint files."""
    sidecar = Sidecar(folder / "sidecar", "fisher")
    return {name: sidecar.load(name).clone() for name in sidecar}


def load(architecture: str, folder: Path) -> nn.Module:
    """Load a model, of which nothing may be missing or of another shape."""
    model, info = getattr(transformers, architecture).from_pretrained(
        folder, output_loading_info=True
    )
    assert not info["missing_keys"], info
    assert not info["mismatched_keys"], info
    return model


def runs(architecture: str) -> bool:
    """Return whether transformers alone computes anything with a model of an architecture."""
    one = example(architecture, 0)
    assert one is not None
    try:
        zoo.build(architecture)(**one.inputs)
    except AttributeError:
        return False
    return True


def _compared(
    architecture: str, folder: Path, examples: Sequence[Example], found: Tensors
) -> float:
    """Return the worst relative error of what was measured, which must not be above `TOLERANCE`."""
    model = load(architecture, folder)
    fishers = loop(model, examples)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(fishers[name])
    model.save_pretrained(folder.parent / "fishers")
    expected = read(folder.parent / "fishers")
    for name, _ in model.named_buffers():
        expected.pop(name, None)
    assert sorted(found) == sorted(expected), sorted(found.keys() ^ expected.keys())
    floor = NOISE * max(oracles.rms(f) for f in expected.values())
    errors = {
        name: oracles.rms(found[name].double() - f.double()) / oracles.rms(f)
        for name, f in expected.items()
        if oracles.rms(f) > floor
    }
    # Nothing else is compared with nothing.
    silent = {name for name in expected.keys() - errors.keys() if not _is_zero(architecture, name)}
    assert not silent, silent
    for name in expected.keys() - errors.keys():
        assert oracles.rms(found[name]) <= 2 * floor, name
    wrong = {name: error for name, error in errors.items() if error > TOLERANCE}
    assert not wrong, f"{len(wrong)} of {len(expected)} tensors: {wrong}"
    return max(errors.values())


def _is_zero(architecture: str, name: str) -> bool:
    """Whether a gradient is zero on paper: what shifts all numbers of a softmax moves nothing.

    So do the bias of attention keys, and that of a choice's number; and an `expert_bias` only
    decides which experts are asked.
    """
    if architecture.endswith("ForMultipleChoice") and name == "classifier.bias":
        return True
    return re.search(r"((key|k_lin|k_proj|attn\.k)\.bias|expert_bias)$", name) is not None


def loop(model: nn.Module, examples: Sequence[Example]) -> oracles.Fishers:
    """Return the mean over examples of the squared gradients, one example at a time, in float64.

    Which outcome the package draws where it draws one is asked of it, by the same logits.
    """
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the others know no float64
    head = likelihood_for(type(model).__name__, model.config)

    def one(model: nn.Module, batch: Batch) -> oracles.Fishers:
        logits = model(**batch.inputs).logits
        log_p = logits[0].log_softmax(-1)
        if log_p.dim() == 1:
            return _expected_over_classes(log_p, model)
        outcome = head.sample(logits.detach(), batch, 0)[0]
        scored = batch.scored[0].nonzero().flatten()
        return oracles.squared(oracles.gradients(log_p[scored, outcome[scored]].sum(), model))

    return oracles.mean_over_examples(model, examples, one)


def _expected_over_classes(log_p: Tensor, model: nn.Module) -> oracles.Fishers:
    total = oracles.zeros(model)
    for y in range(len(log_p)):
        for name, gradient in oracles.gradients(log_p[y], model).items():
            total[name] += log_p[y].detach().exp() * gradient.square()
    return total


def merged(folder: Path, *models: Path) -> Path:
    """Merge measured models by mergekit's own command, in this process; return the output."""
    path, out = folder / "recipe.yml", folder / "merged"
    path.write_text(yaml.safe_dump(recipe_of(*models, lambdas=LAMBDAS)))
    _run(mergekit_yaml, [str(path), str(out), "--quiet"])
    return out


def mergekit_can(architecture: str, folder: Path) -> bool:
    """Return whether mergekit's own plain average of the models gives a whole model."""
    path, out = folder / "linear.yml", folder / "linear"
    path.write_text(yaml.safe_dump(average_of(folder / "a", folder / "b")))
    if CliRunner().invoke(mergekit_yaml, [str(path), str(out), "--quiet"]).exit_code != 0:
        return False
    try:
        load(architecture, out)
    except AssertionError:
        return False
    return True


def average_of(*models: Path) -> dict:
    """Return mergekit's own recipe for a plain average."""
    entries = [{"model": str(model), "parameters": {"weight": 0.5}} for model in models]
    return {"merge_method": "linear", "models": entries, "dtype": "float32"}


def _assert_merged(
    architecture: str, out: Path, models: Sequence[Tensors], fishers: Sequence[Tensors]
) -> None:
    names = sorted(fishers[0])
    expected = merge_oracle.merge(models, fishers, LAMBDAS, names)
    # A model made anew, unlike a loaded one, is saved in the layout of the models' files.
    model = zoo.build(architecture)
    model.load_state_dict(load(architecture, out).state_dict())
    model.save_pretrained(out.parent / "again")
    found = read(out.parent / "again")
    for name, tensor in read(out).items():
        if name in names:
            assert torch.equal(tensor, found[name]), name
        elif name in models[0]:  # not measured
            found[name] = tensor
            expected[name] = (
                LAMBDAS[0] * models[0][name].double() + LAMBDAS[1] * models[1][name].double()
            )
    assert found.keys() >= expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name].double(),
            tensor,
            rtol=1e-5,
            atol=1e-5,
            msg=lambda message, name=name: f"{name}: {message}",
        )
