"""A tiny model of every head, examples for it, and its likelihood written down once more.

Every head says log p(y|x) of one outcome of one example, as plainly as it can be said, and which
outcomes there are, all of them together: what is independent is not taken apart here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import tiny
import torch
from models import FAMILIES, VOCABULARY
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from fisher_mergekit.measure.batches import Example

_BERT = FAMILIES["bert"][1]
_ROBERTA = FAMILIES["roberta"][1] | {"pad_token_id": tiny.PAD}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12,
    "max_position_embeddings": 16,
    "pad_token_id": tiny.PAD,
    "decoder_start_token_id": 2,
    "use_cache": False,
}
_WHISPER = _BART | {
    "num_mel_bins": 4,
    "max_source_positions": 6,
    "max_target_positions": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

Outcome = Any
LogP = Callable[[Any, Example, Outcome], Tensor]


@dataclass(frozen=True)
class Head:
    """A model's head, and all that a test of it needs.

    Attributes:
        log_p: log p(outcome|x) of one example, from the model's output.
        outcomes: every outcome and its weight in the expectation; None for a head that has too
            many.
        fast: no parameter is left to the loop over single examples.
    """

    architecture: str
    sizes: dict[str, Any]
    examples: Callable[[], list[Example]]
    log_p: LogP
    outcomes: Callable[[Any, Example], Iterator[Outcome]] | None
    config: dict[str, Any] = field(default_factory=dict)
    fast: bool = True

    def model(self) -> nn.Module:
        return tiny.build(self.architecture, self.sizes, **self.config)

    def expected(self, output: Any, example: Example) -> Iterator[tuple[float, Tensor]]:
        """Yield (p(y|x), log p(y|x)) of every outcome."""
        for outcome in self.outcomes(output, example):
            log_p = self.log_p(output, example, outcome)
            yield float(log_p.detach().exp()), log_p


class GaussianHead(Head):
    """Two points an output, one standard deviation below and above: exact for a square's mean."""

    def expected(self, output, example):
        k = output.logits.shape[1]
        for signs in product((-1.0, 1.0), repeat=k):
            y = output.logits.detach()[0] + torch.tensor(signs, dtype=output.logits.dtype)
            yield 1 / 2**k, self.log_p(output, example, y)


def one_of(output: Any, example: Example, y: int) -> Tensor:
    return output.logits[0].log_softmax(-1)[int(y)]


def at_positions(output: Any, example: Example, y: Sequence[int]) -> Tensor:
    log_p, total = output.logits[0].log_softmax(-1), output.logits.new_zeros(())
    for position, scored in enumerate(example.scored.tolist()):
        if scored:
            total = total + log_p[position, int(y[position])]
    return total


def span(output: Any, example: Example, y: tuple[int, int]) -> Tensor:
    start, end = output.start_logits[0].log_softmax(-1), output.end_logits[0].log_softmax(-1)
    return start[int(y[0])] + end[int(y[1])]


def squared_error(output: Any, example: Example, y: Tensor) -> Tensor:
    return -0.5 * (y - output.logits[0]).square().sum()


def coins(output: Any, example: Example, y: Tensor) -> Tensor:
    y = torch.as_tensor(y).to(output.logits)
    return -binary_cross_entropy_with_logits(output.logits[0], y, reduction="sum")


def each_class(output: Any, example: Example) -> Iterator[int]:
    yield from range(output.logits.shape[1])


def each_labelling(output: Any, example: Example) -> Iterator[list[int]]:
    """Yield every class at every scored position; elsewhere it does not matter."""
    options = [
        range(output.logits.shape[-1]) if scored else (0,) for scored in example.scored.tolist()
    ]
    yield from map(list, product(*options))


def each_span(output: Any, example: Example) -> Iterator[tuple[int, int]]:
    yield from product(range(output.start_logits.shape[1]), repeat=2)


def each_toss(output: Any, example: Example) -> Iterator[tuple[int, ...]]:
    yield from product((0, 1), repeat=output.logits.shape[1])


def with_outcome(make: Callable[[Example, torch.Generator], Tensor], longest: int = 9) -> Any:
    """Return texts of different lengths, each with an outcome made up for it."""

    def examples() -> list[Example]:
        generator = torch.Generator().manual_seed(11)
        return [
            Example(e.number, e.inputs, outcome=make(e, generator))
            for e in tiny.ragged(5, longest=longest)
        ]

    return examples


def some_words() -> list[Example]:
    """Up to three words an example are scored, at other places in each, one has none."""
    examples = []
    generator = torch.Generator().manual_seed(12)
    for e in tiny.ragged(5):
        scored = torch.zeros(len(e), dtype=torch.bool)
        scored[1 :: 2 + e.number % 2] = e.number != 3
        scored &= scored.cumsum(0) <= 3
        outcome = torch.randint(3, (len(e),), generator=generator)
        examples.append(Example(e.number, e.inputs, scored, outcome))
    return examples


def masked_words() -> list[Example]:
    examples = []
    for e in tiny.ragged(5):
        scored = torch.zeros(len(e), dtype=torch.bool)
        scored[e.number % 2 :: 3] = True
        ids = e.inputs["input_ids"]
        examples.append(
            Example(e.number, {"input_ids": ids.masked_fill(scored, 1)}, scored, ids[0])
        )
    return examples


def choices() -> list[Example]:
    """Choices of different lengths within an example, and longest ones that differ too."""
    examples = []
    generator = torch.Generator().manual_seed(13)
    for number in range(5):
        length = 3 + number
        ids = torch.randint(1, VOCABULARY, (1, 3, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 1, length - 1 :] = 0
        inputs = {"input_ids": ids * mask, "attention_mask": mask}
        examples.append(Example(number, inputs, outcome=torch.tensor(number % 3)))
    return examples


def translations() -> list[Example]:
    """Sources and targets of different lengths, the longest of one with a short other."""
    return [_to_target(e, e.inputs) for e in tiny.ragged(5)]


def sounds() -> list[Example]:
    generator = torch.Generator().manual_seed(14)
    return [
        _to_target(e, {"input_features": torch.randn(1, 4, 12, generator=generator)})
        for e in tiny.ragged(5)
    ]


def _to_target(e: Example, inputs: dict[str, Tensor]) -> Example:
    target = torch.arange(3, 9 + 3 - len(e) + 2) % VOCABULARY
    shifted = torch.cat([torch.tensor([2]), target[:-1]])
    scored = torch.ones(len(target), dtype=torch.bool)
    return Example(e.number, {**inputs, "decoder_input_ids": shifted[None]}, scored, target)


def pictures() -> list[Example]:
    generator = torch.Generator().manual_seed(15)
    return [
        Example(
            n, {"pixel_values": torch.randn(1, 3, 8, 8, generator=generator)},
            outcome=torch.tensor(n % 3),
        )
        for n in range(5)
    ]  # fmt: skip


def _class(e: Example, generator: torch.Generator) -> Tensor:
    return torch.randint(2, (), generator=generator)


def _span(e: Example, generator: torch.Generator) -> Tensor:
    return torch.randint(len(e), (2,), generator=generator)


def _numbers(count: int) -> Any:
    return lambda e, generator: torch.randn(count, generator=generator)


def _coins(e: Example, generator: torch.Generator) -> Tensor:
    return torch.randint(2, (3,), generator=generator).float()


_REGRESSION = {"num_labels": 2, "problem_type": "regression"}
_MULTI_LABEL = {"num_labels": 3, "problem_type": "multi_label_classification"}

HEADS = {
    "token classes": Head(
        "BertForTokenClassification", _BERT, some_words, at_positions, each_labelling,
        {"num_labels": 3},
    ),
    "token classes of a decoder": Head(
        "GPT2ForTokenClassification", FAMILIES["gpt2"][1], some_words, at_positions,
        each_labelling, {"num_labels": 3, "pad_token_id": tiny.PAD},
    ),
    "question answering": Head(
        "BertForQuestionAnswering", _BERT, with_outcome(_span, 6), span, each_span
    ),
    "question answering of RoBERTa": Head(
        "RobertaForQuestionAnswering", _ROBERTA, with_outcome(_span, 6), span, each_span
    ),
    "one number": GaussianHead(
        "BertForSequenceClassification", _BERT, with_outcome(_numbers(1)), squared_error, None,
        {"num_labels": 1},
    ),
    "two numbers": GaussianHead(
        "DistilBertForSequenceClassification", FAMILIES["distilbert"][1],
        with_outcome(_numbers(2)), squared_error, None, _REGRESSION,
    ),
    "several labels": Head(
        "BertForSequenceClassification", _BERT, with_outcome(_coins), coins, each_toss,
        _MULTI_LABEL,
    ),
    "multiple choice": Head(
        "BertForMultipleChoice", _BERT, choices, one_of, each_class
    ),
    "next sentence": Head(
        "BertForNextSentencePrediction", _BERT, with_outcome(_class), one_of, each_class
    ),
    # Its output bias belongs to two modules, one of which has no layer's rule.
    "masked words": Head(
        "BertForMaskedLM", _BERT, masked_words, at_positions, None
    ),
    "masked words of DistilBERT": Head(
        "DistilBertForMaskedLM", FAMILIES["distilbert"][1], masked_words, at_positions, None
    ),
    "translation": Head(
        "T5ForConditionalGeneration",
        FAMILIES["t5"][1] | {"decoder_start_token_id": 2, "pad_token_id": tiny.PAD},
        translations, at_positions, None,
    ),
    "translation of BART": Head(
        "BartForConditionalGeneration", _BART, translations, at_positions, None
    ),
    "speech": Head(
        "WhisperForConditionalGeneration", _WHISPER, sounds, at_positions, None
    ),
    "pictures": Head(
        "ViTForImageClassification", FAMILIES["vit"][1], pictures, one_of, each_class,
        {"num_labels": 3},
    ),
    "several labels of pictures": Head(
        "ViTForImageClassification", FAMILIES["vit"][1],
        lambda: [Example(e.number, e.inputs, outcome=torch.ones(3)) for e in pictures()],
        coins, each_toss, _MULTI_LABEL,
    ),
}  # fmt: skip
