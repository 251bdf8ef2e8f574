"""Tiny models in memory, examples for them, and one call that measures them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers
from models import FAMILIES, VOCABULARY
from torch import Tensor, nn

from fisher_mergekit.measure.batches import Example
from fisher_mergekit.measure.estimators import estimator_for
from fisher_mergekit.measure.likelihoods import likelihood_for
from fisher_mergekit.measure.session import Session

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
    model.config.use_cache = False
    return perturbed(model)


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


def ragged(
    count: int = 7, *, classes: int = 3, longest: int = 9, prompt: bool = False, seed: int = 3
) -> list[Example]:
    """Return examples of different lengths, two to `longest`, with labels."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for number in range(count):
        length = 2 + (number * 5) % (longest - 1)
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        label = int(torch.randint(classes, (), generator=generator))
        examples.append(
            Example(number, {"input_ids": ids}, min(number, length - 1) if prompt else 0, label)
        )
    return examples


def session_for(model: nn.Module, estimator: str = "exact", *, seed: int = 0) -> Session:
    """Return a session; a model that is not from transformers is measured as a classifier."""
    name = type(model).__name__
    known = isinstance(model, transformers.PreTrainedModel)
    return Session(
        model=model,
        likelihood=likelihood_for(name if known else "ForSequenceClassification"),
        estimator=estimator_for(estimator),
        seed=seed,
        pad_token_id=PAD,
        device=torch.device("cpu"),
    )


def measured(
    model: nn.Module,
    examples: Sequence[Example],
    estimator: str = "exact",
    *,
    batch_size: int = 16,
    seed: int = 0,
    fast: bool = True,
) -> dict[str, Tensor]:
    """Measure a model; return its Fisher by parameter name.

    Args:
        fast: assert that no parameter fell back to the loop over single examples.
    """
    session = session_for(model, estimator, seed=seed)
    totals = session.run(examples, batch_size)
    if fast:
        assert session.loose == ()
    return {name: totals[parameter].clone() for name, parameter in model.named_parameters()}
