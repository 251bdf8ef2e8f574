"""Tiny models in memory and on disk, examples for them, and one call that measures them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from models import FAMILIES, VOCABULARY, make_model, read, rewrite
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn

from fisher_mergekit.measure.batches import Example
from fisher_mergekit.measure.estimators import estimator_for
from fisher_mergekit.measure.factors import Factors
from fisher_mergekit.measure.likelihoods import likelihood_for
from fisher_mergekit.measure.likelihoods.causal_lm import next_tokens
from fisher_mergekit.measure.limits import BatchSize
from fisher_mergekit.measure.session import Session
from fisher_mergekit.measure.units import unit_for

PAD = 0

_DECODER = FAMILIES["llama"][1] | {"head_dim": 4, "pad_token_id": PAD}
_GPT2 = FAMILIES["gpt2"][1] | {"pad_token_id": PAD}

CLASSIFIERS = {
    "BertForSequenceClassification": FAMILIES["bert"][1],
    "RobertaForSequenceClassification": FAMILIES["roberta"][1] | {"pad_token_id": PAD},
    "DistilBertForSequenceClassification": FAMILIES["distilbert"][1],
    "GPT2ForSequenceClassification": _GPT2,
    "LlamaForSequenceClassification": _DECODER,
    "Qwen2ForSequenceClassification": _DECODER,
    "Qwen3ForSequenceClassification": _DECODER,
}
"""Sizes of every classifier family that has to run without the loop."""

CAUSAL_LMS = {
    "untied Llama": ("LlamaForCausalLM", _DECODER | {"tie_word_embeddings": False}),
    "tied Llama": ("LlamaForCausalLM", _DECODER | {"tie_word_embeddings": True}),
    "Llama with biases": (
        "LlamaForCausalLM",
        _DECODER | {"attention_bias": True, "mlp_bias": True},
    ),
    "tied Qwen2": ("Qwen2ForCausalLM", _DECODER | {"tie_word_embeddings": True}),
    "untied Qwen3": ("Qwen3ForCausalLM", _DECODER | {"tie_word_embeddings": False}),
    "tied Qwen3": ("Qwen3ForCausalLM", _DECODER | {"tie_word_embeddings": True}),
    "tied GPT-2": ("GPT2LMHeadModel", _GPT2 | {"tie_word_embeddings": True}),
    "untied GPT-2": ("GPT2LMHeadModel", _GPT2 | {"tie_word_embeddings": False}),
}
"""Class and sizes of every causal LM that has to run without the loop."""


def build(architecture: str, sizes: dict, **config: object) -> nn.Module:
    """Make a model whose norms and biases are as random as the rest."""
    model_class = getattr(transformers, architecture)
    torch.manual_seed(0)  # some layers draw their first values themselves
    model = model_class(model_class.config_class(**{**sizes, **config})).eval()
    return perturbed(model, seed=2)  # with 1, no example gets through a ReLU of DistilBERT


def classifier(architecture: str = "BertForSequenceClassification", labels: int = 3) -> nn.Module:
    return build(architecture, CLASSIFIERS[architecture], num_labels=labels)


def causal_lm(name: str = "tied GPT-2") -> nn.Module:
    return build(*CAUSAL_LMS[name])


def perturbed(model: nn.Module, seed: int = 1) -> nn.Module:
    """Add noise to every parameter: zero biases and unit scales would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model


def labelled(
    number: int, input_ids: Sequence[int], label: int | None = None, **inputs: Sequence[int]
) -> Example:
    """Return a text with a class; other integer inputs, one a token, by name."""
    inputs = {"input_ids": input_ids, **inputs}
    tensors = {name: torch.tensor([row]) for name, row in inputs.items()}
    return Example(number, tensors, outcome=None if label is None else torch.tensor(label))


def text(number: int, ids: Sequence[int], prompt: int = 0) -> Example:
    """Return a text for a causal LM."""
    tokens = torch.tensor(ids)
    return Example(number, {"input_ids": tokens[None]}, *next_tokens(tokens, prompt))


def ids_of(example: Example) -> list[int]:
    return example.inputs["input_ids"][0].tolist()


def ragged(count: int = 7, *, classes: int = 3, longest: int = 9, seed: int = 3) -> list[Example]:
    """Return examples of different lengths, two to `longest`, with labels."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for number in range(count):
        length = 2 + (number * 5) % (longest - 1)
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        label = int(torch.randint(classes, (), generator=generator))
        examples.append(labelled(number, ids, label))
    return examples


def ragged_texts(count: int = 7, *, prompt: bool = False, seed: int = 3) -> list[Example]:
    """Return the same for causal LMs; with prompts of every length but the whole, if asked."""
    return [
        text(e.number, ids_of(e), min(e.number, len(e) - 1) if prompt else 0)
        for e in ragged(count, seed=seed)
    ]


def session_for(
    model: nn.Module,
    estimator: str = "exact",
    *,
    seed: int = 0,
    unit: str = "sequence",
    squares: bool = True,
    factors: bool | None = None,
) -> Session:
    """Return a session; a model that is not from transformers is measured as a classifier.

    Args:
        squares: measure the diagonal Fisher.
        factors: measure input factors, and output factors too if true.
    """
    known = isinstance(model, transformers.PreTrainedModel)
    head = (type(model).__name__, model.config) if known else ("ForSequenceClassification",)
    return Session(
        model=model,
        likelihood=likelihood_for(*head),
        estimator=estimator_for(estimator),
        seed=seed,
        pad_token_id=PAD,
        device=torch.device("cpu"),
        unit=unit_for(unit),
        parameters=None if squares else (),
        factors=None
        if factors is None
        else Factors({p: name for name, p in model.named_parameters()}, outputs=factors),
    )


def measured(
    model: nn.Module,
    examples: Sequence[Example],
    estimator: str = "exact",
    *,
    batch_size: BatchSize = 16,
    seed: int = 0,
    unit: str = "sequence",
    fast: bool = True,
) -> dict[str, Tensor]:
    """Measure a model; return its Fisher by parameter name.

    Args:
        fast: assert that no parameter fell back to the loop over single examples.
    """
    session = session_for(model, estimator, seed=seed, unit=unit)
    totals = session.run(examples, batch_size)
    if fast:
        assert session.loose == ()
    return {name: totals[parameter].clone() for name, parameter in model.named_parameters()}


WORDS = [
    *("the", "a", "good", "bad", "film", "cat", "dog", "sat", "ran", "is"),
    *("was", "very", "not", "we", "you", "like", "saw", "no", "user", "model"),
]
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}model {% endif %}"
)
"""Chats of the roles `user` and `model`, which are words of the vocabulary."""


def save_tokenizer(folder: Path, family: str = "bert", *, chat: str | None = None) -> Path:
    """Save a word-level tokenizer of `VOCABULARY` words with a model, made without a network."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    assert len(vocabulary) == VOCABULARY
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    if family in ("bert", "roberta", "distilbert"):
        tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(word, vocabulary[word]) for word in ("[CLS]", "[SEP]")],
        )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_max_length=12,
        # Also for models that have no such input: a generic tokenizer does not know its model.
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    fast.chat_template = chat
    fast.save_pretrained(folder)
    return folder


def save_model(folder: Path, family: str = "bert", *, chat: str | None = None, **options) -> Path:
    """Save a tiny model with its tokenizer."""
    if family == "roberta":
        options = {"pad_token_id": PAD, **options}
    make_model(folder, family, **options)
    # Of unit variance it would be sure of everything, and float32 would lose digits of 1 - p.
    rewrite(folder, {name: 0.4 * tensor for name, tensor in read(folder).items()})
    return save_tokenizer(folder, family, chat=chat)


ROWS = [
    {"text": "the film was very good", "pair": "we like the film", "label": 1},
    {"text": "a bad film", "pair": "no", "label": 0},
    {"text": "the cat sat", "pair": "the dog ran", "label": 2},
    {"text": "not good not very good", "pair": "bad", "label": 0},
    {"text": "we saw you", "pair": "you saw the cat and the dog", "label": 1},
    {"text": "is the dog good", "pair": "the dog is very very good", "label": 2},
    {"text": "no", "pair": "we like no cat", "label": 0},
]
"""Calibration data of three classes, of different lengths."""


def write_rows(path: Path, rows: Sequence[dict] = ROWS) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
