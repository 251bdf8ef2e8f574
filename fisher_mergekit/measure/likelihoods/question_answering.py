"""Extractive question answering: the answer's first and last token, logits `[b, 2, t]`.

p(start, end | x) = softmax(start logits)[start] · softmax(end logits)[end], as these heads are
trained: over all tokens of the example, those of the question too, and no padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fisher_mergekit.errors import CalibrationError, MeasureError
from fisher_mergekit.measure.batches import Batch, Example
from fisher_mergekit.measure.calibration import Row
from fisher_mergekit.measure.encoding import Encoded, Encoder
from fisher_mergekit.measure.likelihoods.base import Likelihood
from fisher_mergekit.measure.likelihoods.draws import inverse_cdf, uniforms
from fisher_mergekit.measure.likelihoods.softmax import covariance_columns, softmax_score

EXPECTED = "expected a mapping as in SQuAD, {text: [ANSWER, …], answer_start: [CHARACTER, …]}"


class QuestionAnswering(Likelihood):
    """Where does the answer start, and where does it end?"""

    name = "question_answering"
    heads = ("ForQuestionAnswering", "ForQuestionAnsweringSimple")
    default_estimator = "sampled"

    def passes(self, config: Any, examples: Sequence[Example]) -> int:
        return 2 * (max(map(len, examples)) - 1)

    def encode(self, row: Row, encoder: Encoder) -> Encoded:
        if not isinstance(row.text, tuple):
            raise CalibrationError("question answering reads a pair: `text: [QUESTION, CONTEXT]`.")
        encoded = encoder.tokens(*row.text, truncation="only_second")
        inputs = encoder.tensors(encoded)
        if row.label is None:
            return inputs, None, None
        return inputs, None, torch.tensor(_span(row.label, row.text[1], encoded, encoder))

    def logits(self, output: Any, batch: Batch) -> Tensor:
        if not hasattr(output, "start_logits"):
            raise MeasureError(
                f"this question answering head gives {', '.join(output.keys())}, and not the "
                "logits of the answer's start and end; such heads cannot be measured."
            )
        logits = torch.stack([output.start_logits, output.end_logits], dim=1)
        padding = batch.inputs["attention_mask"] == 0
        return logits.masked_fill(padding[:, None], -torch.inf)

    def score(self, logits: Tensor, batch: Batch, outcome: Tensor) -> Tensor:
        return softmax_score(logits, outcome)

    def sample(self, logits: Tensor, batch: Batch, seed: int) -> Tensor:
        uniform = uniforms(seed, batch.numbers, 2)
        p = logits.double().softmax(-1)
        return torch.stack([inverse_cdf(p[:, i], uniform[:, i]) for i in (0, 1)], dim=1)

    def factor(self, logits: Tensor, batch: Batch) -> Iterator[Tensor]:
        """Yield t − 1 columns for the start and as many for the end: they are independent."""
        for end in (0, 1):
            for column in covariance_columns(logits[:, end]):
                start = torch.zeros_like(logits, dtype=column.dtype)
                start[:, end] = column
                yield start


def _span(label: Any, context: str, encoded: Any, encoder: Encoder) -> tuple[int, int]:
    """Return the answer's first and last token, or twice the first token if there is none.

    An answer that was cut off with the end of its context is none either, as in the data that
    these heads are trained on.
    """
    if not isinstance(label, Mapping) or not {"text", "answer_start"} <= label.keys():
        raise CalibrationError(f"label {label!r} is no answer; {EXPECTED}.")
    texts, starts = (
        [value] if isinstance(value, (str, int)) else list(value)
        for value in (label["text"], label["answer_start"])
    )
    if not texts:
        return 0, 0
    if len(texts) != len(starts) or not isinstance(texts[0], str) or not texts[0]:
        raise CalibrationError(f"label {label!r} is no answer; {EXPECTED}.")
    text, start = texts[0], int(starts[0])
    if context[start : start + len(text)] != text:
        raise CalibrationError(
            f"the answer {text!r} does not stand at character {start} of the context; there is "
            f"{context[start : start + len(text)]!r}."
        )
    if not encoder.tokenizer.is_fast:
        raise CalibrationError(
            "this model's slow tokenizer cannot find the tokens of an answer. Save a fast "
            "tokenizer with the model, or, as only the empirical estimator needs labels, drop "
            "`label:`."
        )
    ends = [encoded.char_to_token(at, sequence_index=1) for at in (start, start + len(text) - 1)]
    if ends[0] is None or ends[1] is None:
        return 0, 0
    return ends[0], ends[1]
