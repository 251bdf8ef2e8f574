"""What the benchmark runs on: a model and a batch of examples, all of one length."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from fisher_mergekit.measure.batches import Batch, Example, collate
from fisher_mergekit.measure.likelihoods.causal_lm import next_tokens
from fisher_mergekit.study.tasks import minilm


@dataclass(frozen=True)
class Case:
    """One model, one length.

    Attributes:
        model_name: as printed.
        load: makes the model anew; the weights are the same each time.
        tokens: of each example; none is padded.
        batch_size: examples in the one batch that everything is measured on.
        classes: of a classifier; 0 for a language model.
        is_shared: whether `copy` returns the model itself: there is one way only.
    """

    model_name: str
    load: Callable[[], nn.Module]
    tokens: int
    batch_size: int
    classes: int = 0
    is_shared: bool = False

    @property
    def name(self) -> str:
        """What is measured, in one line."""
        classes = f", {self.classes} classes" if self.classes > 2 else ""
        return f"{self.model_name}{classes}, {self.batch_size} x {self.tokens} tokens"

    @cached_property
    def _original(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.load()
        model.config.use_cache = False  # nothing is generated
        return model.eval()

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self._original

    def copy(self) -> nn.Module:
        """Return a model of one's own, which may be changed."""
        return self._original if self.is_shared else copy.deepcopy(self._original)

    @cached_property
    def examples(self) -> list[Example]:
        """Tokens at random, and labels."""
        generator = torch.Generator().manual_seed(0)
        size = (self.batch_size, self.tokens)
        ids = torch.randint(1, self.model.config.vocab_size, size, generator=generator)
        if self.classes:
            return [
                Example(n, {"input_ids": row[None]}, outcome=torch.tensor(n % self.classes))
                for n, row in enumerate(ids)
            ]
        return [
            Example(n, {"input_ids": row[None]}, *next_tokens(row)) for n, row in enumerate(ids)
        ]

    @cached_property
    def batch(self) -> Batch:
        """The examples together."""
        return collate(self.examples, pad_token_id=0)

    def labels(self, batch: Batch) -> Tensor:
        """Return what a transformers model takes as `labels`."""
        if self.classes:
            assert batch.outcome is not None
            return batch.outcome
        return batch.inputs["input_ids"]

    def log_likelihoods(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return log p(y|x) of each example, `[b]`, y being the labels or the text's own tokens."""
        assert batch.outcome is not None
        if self.classes:
            return -cross_entropy(logits, batch.outcome, reduction="none")
        losses = cross_entropy(logits[:, :-1].mT, batch.outcome[:, :-1], reduction="none")
        return -losses.sum(1)


def bert(classes: int) -> nn.Module:
    """MiniLM-L6 with a new head: 22.7M parameters."""
    return AutoModelForSequenceClassification.from_pretrained(
        minilm(),
        num_labels=classes,
        hidden_dropout_prob=0.0,  # Opacus takes nothing but models in training mode
        attention_probs_dropout_prob=0.0,
    )


def llama() -> nn.Module:
    """A model of the shape of SmolLM2-135M: 134.5M parameters. Its weights do not matter."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
    )


def mixtral() -> nn.Module:
    """A mixture of 8 experts, of which a token sees 2: 43M parameters."""
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=16000,
            hidden_size=384,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=6,
            num_local_experts=8,
            num_experts_per_tok=2,
        )
    )


def cases() -> list[Case]:
    """Return what the table shows."""

    def minilm_case(tokens: int, classes: int = 2) -> Case:
        return Case("MiniLM-L6", partial(bert, classes), tokens, 16, classes)

    return [
        minilm_case(16),
        minilm_case(64),
        minilm_case(128),
        minilm_case(256),
        minilm_case(64, classes=3),
        minilm_case(64, classes=8),
        Case("SmolLM2-135M's shape", llama, 128, 4),
        Case("SmolLM2-135M's shape", llama, 512, 2),
        Case("mixture of 8 experts, 43M", mixtral, 128, 8),
    ]


TINY = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def tiny_bert(classes: int) -> nn.Module:
    """A BERT that takes no time."""
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**TINY, **no_dropout, num_labels=classes))


def tiny_llama() -> nn.Module:
    """A Llama that takes no time."""
    return LlamaForCausalLM(LlamaConfig(**TINY, num_key_value_heads=2, tie_word_embeddings=True))


def tiny_mixtral() -> nn.Module:
    """A Mixtral that takes no time."""
    config = MixtralConfig(**TINY, num_key_value_heads=2, num_local_experts=2)
    return MixtralForCausalLM(config)


def smoke_cases() -> list[Case]:
    """Return the same sorts of models, so small that all of them take seconds."""
    return [
        Case("tiny BERT", partial(tiny_bert, 2), 5, 3, 2),
        Case("tiny BERT", partial(tiny_bert, 3), 5, 3, 3),
        Case("tiny Llama", tiny_llama, 5, 3),
        Case("tiny Mixtral", tiny_mixtral, 5, 3),
    ]
