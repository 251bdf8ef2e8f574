"""Multiple choice: one of C given continuations, p(y|x) = softmax of a number for each, `[b, c]`.

The model reads `[b, c, t]`: the text beside each choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fisher_mergekit.errors import CalibrationError
from fisher_mergekit.measure.batches import Example, collate
from fisher_mergekit.measure.calibration import Row
from fisher_mergekit.measure.encoding import Encoded, Encoder
from fisher_mergekit.measure.labels import whole_number
from fisher_mergekit.measure.likelihoods.categorical import OneOf


class MultipleChoice(OneOf):
    """Which choice?"""

    name = "multiple_choice"
    heads = ("ForMultipleChoice",)

    def passes(self, config: Any, examples: Sequence[Example]) -> int:
        return max(example.inputs["input_ids"].shape[1] for example in examples) - 1

    def encode(self, row: Row, encoder: Encoder) -> Encoded:
        if not isinstance(row.text, str) or row.choices is None:
            raise CalibrationError(
                "multiple choice reads one text column and the choices: `text: COLUMN` and "
                "`choices: COLUMN` (a list), or `choices: [COLUMN, COLUMN, …]`."
            )
        rows = [
            Example(number, encoder.tensors(encoder.tokens(row.text, choice)))
            for number, choice in enumerate(row.choices)
        ]
        batch = collate(rows, encoder.pad_token_id)
        inputs = {name: x[None] for name, x in batch.inputs.items()}
        return inputs, None, _outcome(row.label, len(rows))


def _outcome(label: object, choices: int) -> Tensor | None:
    if label is None:
        return None
    index = whole_number(label)
    if index is None or not 0 <= index < choices:
        raise CalibrationError(
            f"label {label!r} is none of the {choices} choices; expected 0 to {choices - 1}."
        )
    return torch.tensor(index)
