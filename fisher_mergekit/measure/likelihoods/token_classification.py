"""Token classification: a class for each word, read at the word's first token, logits `[b, t, c]`.

The words are those of a list, or, in a plain text, those that the tokenizer parts before it looks
for smaller pieces. Later pieces of a word and special tokens are not scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fisher_mergekit.errors import CalibrationError
from fisher_mergekit.measure.calibration import Row
from fisher_mergekit.measure.encoding import Encoded, Encoder
from fisher_mergekit.measure.labels import class_index
from fisher_mergekit.measure.likelihoods.positions import CategoricalPositions

IGNORED = -100
"""The label, in PyTorch's losses and many data sets, of what is not to be scored."""


class TokenClassification(CategoricalPositions):
    """A class for each word."""

    name = "token_classification"
    heads = ("ForTokenClassification",)

    def classes(self, config: Any) -> int:
        return int(config.num_labels)

    def encode(self, row: Row, encoder: Encoder) -> Encoded:
        if not isinstance(row.text, (str, list)):
            raise CalibrationError(
                "token classification reads one column, `text:`, of texts or of lists of words."
            )
        if not encoder.tokenizer.is_fast:
            raise CalibrationError(
                "this model's slow tokenizer does not say which token belongs to which word; save "
                "a fast tokenizer with the model."
            )
        encoded = encoder.tokens(row.text, is_split_into_words=isinstance(row.text, list))
        inputs = encoder.tensors(encoded)
        word_ids = encoded.word_ids(0)
        first = [
            word if word is not None and word != before else None
            for before, word in zip([None, *word_ids], word_ids, strict=False)
        ]
        scored = torch.tensor([word is not None for word in first])
        if row.label is None:
            return inputs, scored, None
        labels = _labels(row, encoder)
        outcome = torch.tensor([IGNORED if word is None else labels[word] for word in first])
        scored &= outcome != IGNORED
        return inputs, scored, outcome.where(scored, 0)


def _labels(row: Row, encoder: Encoder) -> list[int]:
    """Return the class of each word."""
    if not isinstance(row.text, list):
        raise CalibrationError(
            "labels of words need words: a `text:` column that holds a list of words, one for "
            "each label. Only the empirical estimator needs labels; for the others drop `label:`."
        )
    labels: Any = row.label
    if isinstance(labels, str) or not isinstance(labels, Sequence):
        raise CalibrationError(f"label {labels!r} is no list of labels, one a word.")
    if len(labels) != len(row.text):
        raise CalibrationError(f"{len(row.text)} words, but {len(labels)} labels.")
    return [IGNORED if x == IGNORED else class_index(x, encoder.config) for x in labels]
