"""Examples to padded batches.

Examples are batched in order of length, so that little is padding; the order, the batch size and
the padding change nothing of the result beyond rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

_TOKENS = ("input_ids", "decoder_input_ids")
"""Inputs that are token ids; they are padded with the padding token, all others with zero."""


@dataclass(frozen=True, eq=False)
class Example:
    """One example as the model sees it alone, unpadded.

    Attributes:
        number: its place in the calibration data; random draws hang on it.
        inputs: what the model is called with for this example alone, leading axis included:
            `input_ids` `[1, t]` (or `[1, c, t]` for c choices), `pixel_values` `[1, c, h, w]`, ….
            An `attention_mask` of ones is added where there are `input_ids` and no mask.
        scored: `[n]` booleans, at which positions of the logits the likelihood counts; None if
            the logits have no positions.
        outcome: what was observed, aligned with the logits: a class `[]`, a class at each position
            `[n]` (any where it is not scored), or numbers `[k]`; None if nothing was.
    """

    number: int
    inputs: dict[str, Tensor]
    scored: Tensor | None = None
    outcome: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of tokens that the model reads; what is no text counts as one."""
        return sum(self.inputs[name].numel() for name in _TOKENS if name in self.inputs) or 1

    @property
    def form(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """What examples of one batch have in common: their inputs, and all sizes but lengths."""
        return tuple(
            (name, tuple(x.shape if x.is_floating_point() else x.shape[1:-1]))
            for name, x in sorted(self.inputs.items())
        )

    @property
    def is_scored(self) -> bool:
        """Whether the likelihood says anything of this example at all."""
        return self.scored is None or bool(self.scored.any())


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples padded on the right to one length.

    Attributes:
        examples: what it is made of.
        inputs: what the model is called with, the examples' inputs joined along the first axis.
        scored: `[b, n]` booleans, at which positions of the logits the likelihood counts, or None.
        outcome: `[b]`, `[b, n]` or `[b, k]`, what was observed, or None.
        pad_token_id: what its token ids are padded with.
    """

    examples: tuple[Example, ...]
    inputs: dict[str, Tensor]
    scored: Tensor | None
    outcome: Tensor | None
    pad_token_id: int
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def numbers(self) -> tuple[int, ...]:
        """The examples' numbers."""
        return tuple(example.number for example in self.examples)

    @property
    def rows(self) -> int:
        """How many rows the model's layers see: multiple choice folds `[b, c, t]` to `[b c, t]`."""
        ids = self.inputs.get("input_ids")
        return len(self) if ids is None or ids.dim() < 3 else ids.shape[:-1].numel()

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Batch:
        """Return the batch on a device, its floating inputs in a dtype."""

        def moved(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device)

        inputs = {
            name: x.to(device, dtype) if x.is_floating_point() else x.to(device)
            for name, x in self.inputs.items()
        }
        return replace(
            self,
            inputs=inputs,
            scored=moved(self.scored),
            outcome=moved(self.outcome),
            device=device,
            dtype=dtype,
        )

    def token_masks(self) -> dict[str, Tensor]:
        """Return which tokens are no padding, `[b t]`, for every input of tokens."""
        masks = {}
        for name in _TOKENS:
            if name == "input_ids" and name in self.inputs:
                masks[name] = self.inputs["attention_mask"].reshape(-1) != 0
            elif name in self.inputs:
                ones = [torch.ones_like(example.inputs[name]) for example in self.examples]
                masks[name] = _joined(ones, 0).reshape(-1).to(self.device) != 0
        return masks

    def single(self, index: int) -> Batch:
        """Return one example alone, without its padding."""
        return collate([self.examples[index]], self.pad_token_id).to(self.device, self.dtype)


def collate(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """Pad examples of one form to the longest of them."""
    all_inputs = [_with_mask(example.inputs) for example in examples]
    inputs = {
        name: _joined([x[name] for x in all_inputs], pad_token_id if name in _TOKENS else 0)
        for name in all_inputs[0]
    }
    scored = [e.scored[None] for e in examples if e.scored is not None]
    outcomes = [e.outcome[None] for e in examples if e.outcome is not None]
    return Batch(
        examples=tuple(examples),
        inputs=inputs,
        scored=_joined(scored, 0) if len(scored) == len(examples) else None,
        outcome=_joined(outcomes, 0) if len(outcomes) == len(examples) else None,
        pad_token_id=pad_token_id,
    )


def _with_mask(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    if "input_ids" not in inputs or "attention_mask" in inputs:
        return inputs
    return {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}


def _joined(parts: Sequence[Tensor], value: int) -> Tensor:
    """Join along the first axis; whole numbers are padded on the right of their last axis."""
    if parts[0].is_floating_point() or parts[0].dim() < 2:
        return torch.cat(list(parts))
    length = max(part.shape[-1] for part in parts)
    return torch.cat([pad(part, (0, length - part.shape[-1]), value=value) for part in parts])


def used_ids(examples: Iterable[Example]) -> set[int]:
    """Return all token ids that the examples have."""
    found: set[int] = set()
    for example in examples:
        for name in _TOKENS:
            if name in example.inputs:
                found.update(example.inputs[name].unique().tolist())
    return found


def by_length(examples: Sequence[Example]) -> list[Example]:
    """Return the examples, longest first: memory runs out at once or never."""
    return sorted(examples, key=lambda e: (-len(e), e.number))


def batches(
    examples: Sequence[Example], count: Callable[[Example], int], pad_token_id: int
) -> Iterator[Batch]:
    """Yield all examples, longest first; a batch is of one form.

    Args:
        count: how many examples a batch has, of which the given one is the longest.
    """
    forms: dict[object, list[Example]] = {}
    for example in by_length(examples):
        forms.setdefault(example.form, []).append(example)
    for alike in forms.values():
        start = 0
        while start < len(alike):
            stop = start + count(alike[start])
            yield collate(alike[start:stop], pad_token_id)
            start = stop
