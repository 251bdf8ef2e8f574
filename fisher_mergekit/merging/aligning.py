"""Graph tasks that bring tables of tokens in line: the models' rows, and what was measured of them.

    LoadTheta × n ── Gather ── Align (mergekit's arithmetic) ── PickTheta × n ── MergeTask
                                 └ Tokenizer (built in planning) ── TokenRows ┐
    LoadPrecision ──────────────────────────────────────────────── AlignPrecision ── MergeTask

Which row comes from where is mergekit's affair, here as in any merge. What was measured of a
model's own row goes where that row goes; a row that is not the model's own, because it has no such
token or the recipe forces another's row on it, has precision zero.
"""

from __future__ import annotations

from typing import Any

import torch
from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from mergekit.graph import Task
from mergekit.tokenizer import BuildTokenizer, PermutedVocabulary, TokenizerInfo
from mergekit.tokenizer.build import get_stripped_tokenizer
from mergekit.tokenizer.truncate import TruncatedVocabulary

from fisher_mergekit.merging.loading import LoadPrecision, LoadTheta, OwnRows, Precision, Theta
from fisher_mergekit.merging.planned import Planned
from fisher_mergekit.precision.rows import ABSENT, taken, uncoupled


class Tokenizer(BuildTokenizer):
    """mergekit's task that builds the output's tokenizer, which planning has built already."""

    def execute(self, **_: Any) -> TokenizerInfo:
        """Return the tokenizer, and where each model's tokens go."""
        return BUILT.again(self)


def _build(task: Tokenizer) -> TokenizerInfo:
    info = BuildTokenizer.execute(task)
    for permutation in info.permutations.values():
        # mergekit leaves out a token that the model has a number for but no row.
        for number in info.tokenizer.get_vocab().values():
            permutation.setdefault(number, ABSENT)
    if task.tokenizer_source == "base" and task.base_model is not None and task.add_tokens:
        # mergekit adds them to base_model's own tokenizer, and then takes them for tokens that the
        # model has had, in a row of its padding.
        had = get_stripped_tokenizer(task.base_model.model, task.trust_remote_code).get_vocab()
        for token in set(task.add_tokens) - had.keys():
            info.original_vocabs[task.base_model].pop(token, None)
            number = info.tokenizer.get_vocab().get(token)
            if number is not None:
                info.permutations[task.base_model][number] = ABSENT
    return info


BUILT = Planned(_build)
"""The output's tokenizer, by its task."""


class Gather(Task[dict[ModelReference, torch.Tensor]]):
    """One tensor of several models, as mergekit's tasks for vocabularies want it.

    Attributes:
        thetas: the models'.
        label: the output tensor's name.
    """

    thetas: tuple[LoadTheta, ...]
    label: str

    def arguments(self) -> dict[str, Task[Any]]:
        """Return the tasks that load the tensors."""
        return {f"theta_{i}": task for i, task in enumerate(self.thetas)}

    def group_label(self) -> str:
        """Return the output tensor's name."""
        return self.label

    def execute(self, **thetas: torch.Tensor) -> dict[ModelReference, torch.Tensor]:
        """Return the tensors by model."""
        return {task.model: thetas[f"theta_{i}"] for i, task in enumerate(self.thetas)}


class AlignThetas(PermutedVocabulary):
    """mergekit's own alignment by tokens, of what we have loaded."""

    gather_tensors: Gather

    def group_label(self) -> str:
        """Return the output tensor's name."""
        return self.gather_tensors.label


class TruncateThetas(TruncatedVocabulary):
    """mergekit's own truncation to the smallest vocabulary, of what we have loaded."""

    gather_tensors: Gather
    weight_info: WeightInfo


class PickTheta(Theta):
    """One model's tensor among those that were brought in line.

    Attributes:
        name: the tensor's name in the model's files.
        aligned: all models'.
    """

    aligned: AlignThetas | TruncateThetas

    def arguments(self) -> dict[str, Task[Any]]:
        """Return the task that brings them in line."""
        return {"aligned": self.aligned}

    def group_label(self) -> str:
        """Return the output tensor's name."""
        return str(self.aligned.group_label())

    def execute(self, aligned: dict[ModelReference, torch.Tensor], **_: Any) -> torch.Tensor:
        """Return the model's."""
        return aligned[self.model]


class TokenRows(OwnRows):
    """Which of a model's own rows stands at each token of the output.

    Rows behind the last token are padding.

    Attributes:
        tokenizer: the output's.
        forced: tokens that all models get from one source.
    """

    model: ModelReference
    tokenizer: Tokenizer
    forced: tuple[str, ...] = ()

    def arguments(self) -> dict[str, Task[Any]]:
        """Return the task that builds the tokenizer."""
        return {"info": self.tokenizer}

    def execute(self, info: TokenizerInfo, **_: Any) -> torch.Tensor:
        """Return the rows' numbers, int64."""
        # On the CPU, where the precisions are, also in a thread that works for one of several GPUs.
        rows = torch.full((self.size,), ABSENT, device="cpu")
        places = info.permutations[self.model]
        own = torch.tensor(list(places.values()), device="cpu")
        rows[torch.tensor(list(places), device="cpu")] = own
        numbers = info.tokenizer.get_vocab()
        rows[[numbers[token] for token in self.forced]] = ABSENT
        return rows


class FirstRows(OwnRows):
    """The rows that truncation keeps of every model."""

    def arguments(self) -> dict[str, Task[Any]]:
        """Return nothing: it depends on nothing."""
        return {}

    def execute(self, **_: Any) -> torch.Tensor:
        """Return the rows' numbers, int64."""
        return torch.arange(self.size, device="cpu")


class AlignPrecision(Precision):
    """What was measured of one model's rows of tokens, moved along with them.

    Attributes:
        precision: as measured.
        rows: which of the model's own rows is where.
        axes: of the measured tensor, along which tokens run.
        among: of a factor that couples tokens, all models' rows.
    """

    precision: LoadPrecision
    rows: OwnRows
    axes: tuple[int, ...]
    among: tuple[OwnRows, ...] = ()

    def arguments(self) -> dict[str, Task[Any]]:
        """Return the tasks that load the precision, and say where it goes."""
        others = {f"among_{i}": task for i, task in enumerate(self.among)}
        return {"precision": self.precision, "rows": self.rows, **others}

    def group_label(self) -> str:
        """Return the precision's own label."""
        return self.precision.label

    def execute(
        self, precision: torch.Tensor, rows: torch.Tensor, **among: torch.Tensor
    ) -> torch.Tensor:
        """Return the precision of the output's tokens, zero where the model has none of its own."""
        result = taken(precision, rows, self.axes)
        return uncoupled(result, [r >= 0 for r in among.values()]) if among else result
