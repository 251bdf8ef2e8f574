"""Next sentence prediction: class 0 says that the second text follows the first, 1 that not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fisher_mergekit.errors import CalibrationError
from fisher_mergekit.measure.batches import Example
from fisher_mergekit.measure.calibration import Row
from fisher_mergekit.measure.encoding import Encoded, Encoder
from fisher_mergekit.measure.labels import whole_number
from fisher_mergekit.measure.likelihoods.categorical import OneOf


class NextSentence(OneOf):
    """Does the second of a pair follow the first?"""

    name = "next_sentence"
    heads = ("ForNextSentencePrediction",)

    def passes(self, config: Any, examples: Sequence[Example]) -> int:
        return 1

    def encode(self, row: Row, encoder: Encoder) -> Encoded:
        if not isinstance(row.text, tuple):
            raise CalibrationError("this head reads a pair: `text: [FIRST, SECOND]`.")
        inputs = encoder.read(row).inputs
        if row.label is None:
            return inputs, None, None
        label = whole_number(row.label)
        if label not in (0, 1):
            raise CalibrationError(
                f"label {row.label!r} is neither 0 (the second text follows) nor 1 (it does not)."
            )
        return inputs, None, torch.tensor(label)
