"""Token ids to padded batches.

Examples are batched in order of length, so that little is padding; the order, the batch size and
the padding change nothing of the result beyond rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Example:
    """One tokenised example, unpadded.

    Attributes:
        number: its place in the calibration data; random draws hang on it.
        inputs: model inputs by name, one integer a token, `input_ids` among them.
        prompt: how many leading tokens are not scored by a language model's likelihood.
        label: class index, or None.
    """

    number: int
    inputs: dict[str, list[int]]
    prompt: int = 0
    label: int | None = None

    def __len__(self) -> int:
        return len(self.inputs["input_ids"])


@dataclass(frozen=True)
class Batch:
    """Examples padded on the right to one length.

    Attributes:
        inputs: `[b, t]` integer tensors by name, with `attention_mask`.
        scored: `[b, t]`, which tokens a language model's likelihood counts.
        labels: `[b]` class indices, or None.
        examples: the examples' numbers.
        lengths: the examples' lengths without padding.
    """

    inputs: dict[str, Tensor]
    scored: Tensor
    labels: Tensor | None
    examples: tuple[int, ...]
    lengths: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.examples)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return replace(
            self,
            inputs={name: x.to(device) for name, x in self.inputs.items()},
            scored=self.scored.to(device),
            labels=None if self.labels is None else self.labels.to(device),
        )

    def single(self, index: int) -> Batch:
        """Return one example alone, without its padding."""
        row, length = slice(index, index + 1), self.lengths[index]
        return Batch(
            inputs={name: x[row, :length] for name, x in self.inputs.items()},
            scored=self.scored[row, :length],
            labels=None if self.labels is None else self.labels[row],
            examples=self.examples[row],
            lengths=self.lengths[row],
        )


def collate(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """Pad examples to the longest of them."""
    length = max(len(example) for example in examples)

    def padded(name: str, value: int) -> Tensor:
        rows = [e.inputs[name] + [value] * (length - len(e)) for e in examples]
        return torch.tensor(rows, dtype=torch.long)

    inputs = {
        name: padded(name, pad_token_id if name == "input_ids" else 0)
        for name in examples[0].inputs
    }
    lengths = torch.tensor([len(e) for e in examples])
    prompts = torch.tensor([e.prompt for e in examples])
    position = torch.arange(length)[None, :]
    inputs["attention_mask"] = (position < lengths[:, None]).long()
    labels = [e.label for e in examples if e.label is not None]
    return Batch(
        inputs=inputs,
        scored=(position < lengths[:, None]) & (position >= prompts[:, None]),
        labels=torch.tensor(labels) if len(labels) == len(examples) else None,
        examples=tuple(e.number for e in examples),
        lengths=tuple(len(e) for e in examples),
    )


def by_length(examples: Sequence[Example]) -> list[Example]:
    """Return the examples, longest first: memory runs out at once or never."""
    return sorted(examples, key=lambda e: (-len(e), e.number))


def batches(examples: Sequence[Example], size: int, pad_token_id: int) -> Iterator[Batch]:
    """Yield all examples, longest first, `size` at a time."""
    ordered = by_length(examples)
    for start in range(0, len(ordered), size):
        yield collate(ordered[start : start + size], pad_token_id)
