"""Scores, factors and draws of every head, against the likelihood written down once more."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import tiny
import torch
from heads import HEADS
from models import VOCABULARY

from fisher_mergekit.measure.batches import Example, collate
from fisher_mergekit.measure.likelihoods import likelihood_for

pytestmark = pytest.mark.slow  # exhaustive: not needed at every change

CLASSES = 3
KINDS = {
    "token classes": (4, CLASSES),
    "question answering": (2, 5),
    "one number": (1,),
    "two numbers": (2,),
    "several labels": (CLASSES,),
    "multiple choice": (CLASSES,),
    "next sentence": (2,),
    "masked words": (4, CLASSES),
    "translation": (4, CLASSES),
}
"""One head of each likelihood, and the size of one example's logits."""
SCORED = torch.tensor([True, False, True, True])


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def likelihood_of(name):
    head = HEADS[name]
    config = SimpleNamespace(
        num_labels=head.config.get("num_labels", 3),
        problem_type=head.config.get("problem_type"),
        is_encoder_decoder="translation" in name,
    )
    return likelihood_for(head.architecture, config)


def examples_for(name, count=1):
    length = KINDS[name][-1] if name == "question answering" else 4
    ids = torch.ones(1, length, dtype=torch.long)
    scored = SCORED if len(KINDS[name]) == 2 and name != "question answering" else None
    return [Example(number, {"input_ids": ids}, scored) for number in range(count)]


def output_of(name, logits):
    """What a model would say: `[2, t]` logits of answers come as two tensors."""
    if name == "question answering":
        return SimpleNamespace(start_logits=logits[:, 0], end_logits=logits[:, 1])
    return SimpleNamespace(logits=logits)


def random_logits(name, count=1):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, *KINDS[name], generator=generator, dtype=torch.float64)


def test_the_score_is_the_gradient_of_the_log_likelihood(kind):
    likelihood, (example,) = likelihood_of(kind), examples_for(kind)
    logits = random_logits(kind).requires_grad_()
    batch = collate([example], tiny.PAD)
    for seed in range(4):
        outcome = likelihood.sample(logits.detach(), batch, seed)
        log_p = HEADS[kind].log_p(output_of(kind, logits), example, outcome[0])
        (expected,) = torch.autograd.grad(log_p, logits)
        score = likelihood.score(logits.detach(), batch, outcome)
        torch.testing.assert_close(score, expected)


@pytest.mark.parametrize("name", [n for n in KINDS if HEADS[n].outcomes or "number" in n])
def test_the_factor_multiplies_to_the_covariance_of_the_scores(name):
    """Over all outcomes together: that some are independent is for the factor to know."""
    likelihood, (example,) = likelihood_of(name), examples_for(name)
    logits = random_logits(name).requires_grad_()
    covariance = torch.zeros(logits.numel(), logits.numel(), dtype=torch.float64)
    for weight, log_p in HEADS[name].expected(output_of(name, logits), example):
        (score,) = torch.autograd.grad(log_p, logits)
        covariance += weight * torch.outer(score.flatten(), score.flatten())
    columns = list(likelihood.factor(logits.detach(), collate([example], tiny.PAD)))
    found = sum(torch.outer(c.flatten().double(), c.flatten().double()) for c in columns)
    torch.testing.assert_close(found, covariance)
    config = SimpleNamespace(num_labels=logits.shape[-1])
    if name == "multiple choice":
        (example,) = (Example(0, {"input_ids": torch.ones(1, CLASSES, 2, dtype=torch.long)}),)
    assert len(columns) == likelihood.passes(config, [example])


@pytest.mark.parametrize("name", [n for n in KINDS if HEADS[n].outcomes])
def test_outcomes_are_drawn_as_often_as_they_are_likely(name):
    """Within four standard deviations, for each outcome of all at once."""
    likelihood, count = likelihood_of(name), 6000
    logits = random_logits(name).expand(count, *KINDS[name])
    batch = collate(examples_for(name, count), tiny.PAD)
    drawn = likelihood.sample(logits, batch, 0).reshape(count, -1).long()
    counts: dict[tuple[int, ...], int] = {}
    for row in drawn.tolist():
        counts[tuple(row)] = counts.get(tuple(row), 0) + 1
    (example,) = examples_for(name)
    output = output_of(name, logits[:1])
    seen = 0
    for outcome in HEADS[name].outcomes(output, example):
        p = float(HEADS[name].log_p(output, example, outcome).exp())
        key = tuple(outcome) if isinstance(outcome, (list, tuple)) else (outcome,)
        found = counts.get(key, 0)
        seen += found
        assert abs(found - count * p) <= 4 * math.sqrt(count * p * (1 - p)) + 1, outcome
    assert seen == count


def test_drawn_numbers_are_gaussian():
    likelihood, count = likelihood_of("two numbers"), 20_000
    logits = torch.tensor([[3.0, -1.0]], dtype=torch.float64).expand(count, 2)
    noise = likelihood.sample(logits, collate(examples_for("two numbers", count), 0), 0) - logits
    assert noise.mean(0).abs().max() < 4 / math.sqrt(count)
    assert (noise.square().mean(0) - 1).abs().max() < 4 * math.sqrt(2 / count)
    assert (noise.pow(4).mean(0) - 3).abs().max() < 4 * math.sqrt(96 / count)
    assert (noise[:, 0] * noise[:, 1]).mean().abs() < 4 / math.sqrt(count)


def test_draws_hang_on_nothing_but_seed_and_example(kind):
    likelihood, examples = likelihood_of(kind), examples_for(kind, 5)
    logits = random_logits(kind, 5)
    whole = likelihood.sample(logits, collate(examples, tiny.PAD), 3)
    some = likelihood.sample(logits[[4, 1]], collate([examples[4], examples[1]], tiny.PAD), 3)
    assert torch.equal(some, whole[[4, 1]])
    others = [likelihood.sample(logits, collate(examples, tiny.PAD), seed) for seed in range(4, 9)]
    assert not all(torch.equal(other, whole) for other in others)


def test_several_labels_keep_their_digits_where_a_model_is_sure():
    likelihood = likelihood_of("several labels")
    logits = torch.tensor([[600.0, -600.0, 40.0]], dtype=torch.float64)
    batch = collate(examples_for("several labels"), tiny.PAD)
    deviations = torch.stack(list(likelihood.factor(logits, batch)))[range(3), 0, range(3)]
    expected = [math.exp(-300), math.exp(-300), math.exp(-20)]
    assert deviations.tolist() == pytest.approx(expected, rel=1e-9)
    score = likelihood.score(logits, batch, torch.ones(1, 3))
    assert score[0, 2].item() == pytest.approx(math.exp(-40), rel=1e-9)


def test_padding_is_no_place_for_an_answer():
    """Its logits are minus infinity, no score moves them, no draw falls there, nothing is NaN."""
    likelihood = likelihood_of("question answering")
    examples = [tiny.labelled(0, [3, 4]), tiny.labelled(1, [3, 4, 5, 6, 7])]
    batch = collate(examples, tiny.PAD)
    raw = torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logits = likelihood.logits(output_of("question answering", raw), batch)
    alone = likelihood.logits(output_of("question answering", raw[:1, :, :2]), batch.single(0))
    starts = list(likelihood.factor(logits.detach(), batch))
    starts += [
        likelihood.score(logits.detach(), batch, likelihood.sample(logits.detach(), batch, seed))
        for seed in range(50)
    ]
    for start in starts:
        assert not start.isnan().any()
        (gradient,) = torch.autograd.grad(logits, raw, start.to(logits.dtype), retain_graph=True)
        assert not gradient[0, :, 2:].any()
        assert not gradient.isnan().any()
    for seed in range(50):
        padded = likelihood.sample(logits.detach(), batch, seed)[:1]
        assert torch.equal(padded, likelihood.sample(alone.detach(), batch.single(0), seed))


@pytest.mark.parametrize(
    ("architecture", "config", "expected"),
    [
        ("BertForSequenceClassification", {"num_labels": 1}, "regression"),
        ("BertForSequenceClassification", {"num_labels": 2}, "categorical"),
        ("ViTForImageClassification", {"num_labels": 9}, "categorical"),
        ("DeiTForImageClassificationWithTeacher", {"num_labels": 9}, "categorical"),
        ("XForSequenceClassification", {"num_labels": 2, "problem_type": "regression"},
         "regression"),
        ("XForSequenceClassification",
         {"num_labels": 2, "problem_type": "multi_label_classification"}, "multi_label"),
        ("T5ForConditionalGeneration", {"is_encoder_decoder": True}, "seq2seq_lm"),
        ("MarianMTModel", {"is_encoder_decoder": True}, "seq2seq_lm"),
        ("WhisperForConditionalGeneration", {"is_encoder_decoder": True}, "seq2seq_lm"),
        ("Qwen2VLForConditionalGeneration", {"is_encoder_decoder": False}, "causal_lm"),
        ("GPT2LMHeadModel", {"is_encoder_decoder": False}, "causal_lm"),
        ("BertForMaskedLM", {"is_encoder_decoder": False}, "masked_lm"),
        ("BertForNextSentencePrediction", {}, "next_sentence"),
        ("BertForMultipleChoice", {}, "multiple_choice"),
        ("BertForTokenClassification", {}, "token_classification"),
        ("FlaubertForQuestionAnsweringSimple", {}, "question_answering"),
    ],
)  # fmt: skip
def test_the_head_is_told_by_the_class_and_its_configuration(architecture, config, expected):
    assert likelihood_for(architecture, SimpleNamespace(**config)).name == expected


def test_a_language_model_s_exact_fisher_is_counted_by_words():
    examples = tiny.ragged_texts(3)
    config = tiny.causal_lm().config
    longest = max(map(len, examples)) - 1
    passes = likelihood_for("GPT2LMHeadModel", config).passes(config, examples)
    assert passes == longest * (VOCABULARY - 1)
