"""What log p(y|x) is for each head: factors, scores, draws, and closed forms on paper."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fisher_mergekit.errors import CalibrationError, MeasureError
from fisher_mergekit.measure.batches import collate
from fisher_mergekit.measure.likelihoods import likelihood_for
from fisher_mergekit.measure.likelihoods.categorical import Categorical
from fisher_mergekit.measure.likelihoods.causal_lm import CausalLM
from fisher_mergekit.measure.likelihoods.draws import inverse_cdf, uniforms

NO_BATCH = collate([tiny.labelled(0, [1])], tiny.PAD)
logit = st.floats(-800, 800) | st.floats(-3, 3)


class LogisticRegression(nn.Module):
    """p(y = 1 | x) = σ(wᵀx + b) as two logits (0, wᵀx + b)."""

    def __init__(self):
        super().__init__()
        self.unit = nn.Linear(3, 1, dtype=torch.float64)

    def forward(self, input_ids, attention_mask):
        logit = self.unit(features(input_ids))
        return SimpleNamespace(logits=torch.cat([torch.zeros_like(logit), logit], dim=1))


def features(input_ids):
    return torch.stack([input_ids[:, i].double() / 4 - 1 for i in range(3)], dim=1)


def test_exact_on_a_logistic_regression_is_the_closed_form():
    """For y ∈ {0, 1}: ∂ log p(y|x)/∂w = (y − p) x, and E_y (y − p)² = p (1 − p).

    So F_w = mean of p (1 − p) x², and F_b = mean of p (1 − p).
    """
    model = LogisticRegression()
    with torch.no_grad():
        model.unit.weight.copy_(torch.tensor([[0.5, -1.0, 2.0]]))
        model.unit.bias.fill_(0.25)
    ids = [[1, 2, 3], [7, 1, 4], [2, 9, 5], [4, 4, 4], [8, 8, 1]]
    x = features(torch.tensor(ids))
    p = torch.sigmoid(x @ torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64) + 0.25)
    variance = p * (1 - p)

    examples = [tiny.labelled(number, row) for number, row in enumerate(ids)]
    found = tiny.measured(model, examples, batch_size=2)

    expected_weight = (variance[:, None] * x.square()).mean(0)
    torch.testing.assert_close(found["unit.weight"].double()[0], expected_weight, rtol=1e-6, atol=0)
    assert found["unit.bias"].item() == pytest.approx(variance.mean().item(), rel=1e-6)


@settings(max_examples=200)
@given(st.lists(logit, min_size=2, max_size=6))
def test_the_factor_multiplies_to_the_covariance_of_the_scores(logits):
    """LLᵀ = diag(p) − ppᵀ in C − 1 columns, also where the model is all but sure."""
    logits = torch.tensor([logits], dtype=torch.float64)
    p = logits.softmax(-1)[0]
    columns = list(Categorical().factor(logits, NO_BATCH))
    assert len(columns) == len(p) - 1
    product = sum(torch.outer(c[0], c[0]) for c in columns)
    torch.testing.assert_close(product, p.diag() - torch.outer(p, p), rtol=1e-9, atol=1e-15)


@settings(max_examples=100)
@given(st.floats(-600, 600))
def test_the_factor_keeps_its_digits_where_a_model_is_sure(gap):
    """p (1 − p) of two classes is e^−|gap| / (1 + e^−|gap|)²: no cancellation against one."""
    (column,) = Categorical().factor(torch.tensor([[gap, 0.0]], dtype=torch.float64), NO_BATCH)
    small = math.exp(-abs(gap))
    variance = small / (1 + small) ** 2
    assert column[0].square().tolist() == pytest.approx([variance, variance], rel=1e-9)


def test_the_factor_and_the_score_are_those_of_the_float64_softmax():
    logits = torch.tensor([[2.0, -1.0, 0.5]], dtype=torch.float64, requires_grad=True)
    log_p = logits.log_softmax(-1)[0]
    for y in range(3):
        (expected,) = torch.autograd.grad(log_p[y], logits, retain_graph=True)
        score = Categorical().score(logits.detach(), NO_BATCH, torch.tensor([y]))
        torch.testing.assert_close(score, expected)


class TestCausalLMScores:
    """log p(x) = Σ_t log p(x_t | x_<t) over the second to the last token, prompt left out."""

    @pytest.fixture
    def batch(self):
        return collate(
            [
                tiny.text(0, [5, 3, 4, 2]),
                tiny.text(1, [5, 6]),
                tiny.text(2, [5, 3, 7], prompt=2),
                tiny.text(3, [5]),
                tiny.text(4, [5, 3], prompt=2),
            ],
            pad_token_id=0,
        )

    def test_only_positions_that_predict_a_scored_token_count(self, batch):
        logits = torch.randn(5, 4, 8)
        score = CausalLM().score(logits, batch, CausalLM().observed(batch))
        scored = score.abs().sum(-1) > 0
        assert scored.int().tolist() == [
            [1, 1, 1, 0],  # the last position predicts nothing
            [1, 0, 0, 0],  # padding
            [0, 1, 0, 0],  # two tokens of prompt: only the third token is scored
            [0, 0, 0, 0],  # a first token has nothing before it
            [0, 0, 0, 0],  # all prompt
        ]

    def test_the_score_is_the_gradient_of_the_summed_log_likelihood(self, batch):
        logits = torch.randn(5, 4, 8, requires_grad=True)
        log_p = logits.log_softmax(-1)
        total = log_p[0, [0, 1, 2], [3, 4, 2]].sum() + log_p[1, 0, 6] + log_p[2, 1, 7]
        (expected,) = torch.autograd.grad(total, logits)
        score = CausalLM().score(logits.detach(), batch, CausalLM().observed(batch))
        torch.testing.assert_close(score, expected)

    def test_chunks_change_nothing(self, batch, monkeypatch):
        from fisher_mergekit.measure.likelihoods import positions

        logits = torch.randn(5, 4, 8)

        def outcome_and_score():
            outcome = CausalLM().sample(logits, batch, 3)
            score = CausalLM().score(logits, batch, outcome)
            assert torch.equal(CausalLM().sampled_score(logits, batch, 3), score)
            return outcome, score

        whole = outcome_and_score()
        monkeypatch.setattr(positions, "CHUNK_ELEMENTS", 16)
        for found, expected in zip(outcome_and_score(), whole, strict=True):
            assert torch.equal(found, expected)


class TestDraws:
    def test_a_draw_depends_on_seed_and_example_alone(self):
        long = uniforms(7, [0, 1, 2], 40)
        assert torch.equal(uniforms(7, [2, 0], 40), long[[2, 0]])
        for length in (1, 7, 15, 16, 17, 33):  # libraries vectorise from 16 on
            assert torch.equal(uniforms(7, [1], length)[0], long[1, :length])

    def test_other_seeds_and_other_examples_draw_differently(self):
        numbers = torch.cat([uniforms(seed, range(50), 4) for seed in (-1, 0, 1, 2, 1234567)])
        assert len(numbers.flatten().unique()) == numbers.numel()

    def test_outcomes_follow_the_probabilities(self):
        p = torch.tensor([0.5, 0.0, 0.3, 0.2])
        n = 20_000
        uniform = uniforms(0, range(n), 1)[:, 0]
        counts = inverse_cdf(p.expand(n, -1), uniform).bincount(minlength=4)
        assert counts[1] == 0
        for count, chance in zip(counts.tolist(), p.tolist(), strict=True):
            assert abs(count - n * chance) <= 4 * math.sqrt(n * chance * (1 - chance))

    @pytest.mark.parametrize("k", [256, 511, 512, 513, 1000])
    def test_a_vocabulary_is_drawn_from_as_by_its_running_sum(self, k):
        """Where u is in the middle between two values of the cdf, there is one right outcome."""
        torch.manual_seed(k)
        p = (0.1 + torch.rand(k)) * (torch.rand(k) < 0.7)  # none as small as rounding
        p /= p.sum()
        cdf = p.double().cumsum(0)
        possible = p.nonzero()[:, 0]
        middle = (cdf[possible] - p[possible] / 2) / cdf[-1]
        assert torch.equal(inverse_cdf(p.expand(len(middle), -1), middle), possible)

    @pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
    @pytest.mark.parametrize("zeros", [1, 256, 300])
    def test_the_ends_of_the_unit_interval_are_possible_in_a_vocabulary(self, uniform, zeros):
        p = torch.rand(1, 1024)
        p[:, :zeros] = 0.0
        p[:, -zeros:] = 0.0
        outcome = inverse_cdf(p / p.sum(), torch.tensor([uniform], dtype=torch.float64))
        assert p[0, outcome] > 0

    @pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
    def test_the_ends_of_the_unit_interval_are_possible_outcomes(self, uniform):
        p = torch.tensor([[0.0, 0.25, 0.75, 0.0]], dtype=torch.float64)
        outcome = inverse_cdf(p, torch.tensor([uniform], dtype=torch.float64))
        assert p[0, outcome] > 0


def test_a_head_without_a_likelihood_is_refused_with_those_that_have_one():
    with pytest.raises(MeasureError, match=r"BertForPreTraining.*ForSequenceClassification"):
        likelihood_for("BertForPreTraining")


def test_the_empirical_estimator_says_that_an_example_has_no_label():
    batch = collate([tiny.labelled(0, [1])], pad_token_id=0)
    with pytest.raises(CalibrationError, match="a label for every example"):
        Categorical().observed(batch)
