"""Models that no rule covers whole: measured as exactly, only slower, and said in the log."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import oracles
import pytest
import tiny
import torch
from models import VOCABULARY
from odd import CLASSES, WIDTH, Odd
from torch import nn

from fisher_mergekit.measure.likelihoods.regression import Regression

pytestmark = pytest.mark.slow  # exhaustive: not needed at every change


class BareParameter(Odd):
    """A parameter in the parent itself: no layer."""

    loose = ("scale", "matrix")

    def add_odd(self):
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.matrix = nn.Parameter(torch.zeros(WIDTH, WIDTH))

    def odd(self, x, mask, ids):
        return (x * self.scale + x @ self.matrix).tanh()


class TwoInputs(Odd):
    """A module of two tensors, one of them by name."""

    again = ("mix.weight", "mix.bias")

    def add_odd(self):
        self.mix = nn.Bilinear(WIDTH, WIDTH, WIDTH)

    def odd(self, x, mask, ids):
        return self.mix(x, input2=x.flip(-1))


class LinearOfTwo(nn.Linear):
    """Inherits from Linear, and multiplies by its matrix on the way."""

    def forward(self, x, gate):
        return super().forward(x) * gate


class SubclassWithTwoInputs(Odd):
    def add_odd(self):
        self.gated = LinearOfTwo(WIDTH, WIDTH)

    def odd(self, x, mask, ids):
        return self.gated(x, x.sigmoid())


class LinearByKeyword(Odd):
    """An ordinary Linear, whose input has a name."""

    def add_odd(self):
        self.project = nn.Linear(WIDTH, WIDTH)

    def odd(self, x, mask, ids):
        return self.project(input=x)


class TokensFirst(Odd):
    """A Linear on `[t, b, d]`."""

    loose = ("project.weight", "project.bias")

    def add_odd(self):
        self.project = nn.Linear(WIDTH, WIDTH)

    def odd(self, x, mask, ids):
        return x + self.project(x.transpose(0, 1)).transpose(0, 1).tanh()


class FoldedIntoOne(Odd):
    """A Linear on `[b t, d]`, as routers of mixtures of experts have it."""

    def add_odd(self):
        self.project = nn.Linear(WIDTH, WIDTH)

    def odd(self, x, mask, ids):
        return x + self.project(x.flatten(0, 1)).view_as(x).tanh()


class WithoutExamples(Odd):
    """A Linear on `[t, d]`, the same for all examples; t may be the batch size."""

    loose = ("project.weight", "project.bias")

    def add_odd(self):
        self.project = nn.Linear(WIDTH, WIDTH)

    def odd(self, x, mask, ids):
        steps = torch.arange(x.shape[1] * WIDTH, dtype=x.dtype).view(x.shape[1], WIDTH)
        return x + self.project(steps.cos())


class UsedTwice(Odd):
    """One module, two places: its two gradients meet before the square."""

    def add_odd(self):
        self.project = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def odd(self, x, mask, ids):
        return self.norm(self.project(self.norm(self.project(x)).tanh()))


class SharedParameter(Odd):
    """Two modules, one tensor, both ways round."""

    def add_odd(self):
        self.up = nn.Linear(WIDTH, VOCABULARY)
        self.up.weight = self.embed.weight
        self.down = nn.Linear(VOCABULARY, WIDTH)

    def odd(self, x, mask, ids):
        return self.down(self.up(x).tanh())


class SharedWithALooseOne(Odd):
    """A tensor that a rule covers in one place and none in the other."""

    loose = ("embed.weight",)

    def odd(self, x, mask, ids):
        return (x @ self.embed.weight.T).tanh() @ self.embed.weight


class HitSometimes(Odd):
    """A layer that only some batches reach: those with long examples."""

    def add_odd(self):
        self.long = nn.Linear(WIDTH, WIDTH)
        self.short = nn.Linear(WIDTH, WIDTH)

    def odd(self, x, mask, ids):
        is_long = (mask.sum(1, keepdim=True) > 5).to(x.dtype)
        if is_long.any():
            x = x + is_long * self.long(x).tanh()
        if not is_long.all():
            x = x + (1 - is_long) * self.short(x).tanh()
        return x


class NeverHit(Odd):
    """A layer that nothing reaches: its Fisher is zero."""

    def add_odd(self):
        self.unused = nn.Linear(WIDTH, WIDTH)


class Token(nn.Module):
    """Parameters in a module with children: a first token and positions, as in vision models."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.zeros(1, 20, WIDTH))
        self.project = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = torch.cat([self.first.expand(len(x), -1, -1), self.project(x)[:, 1:]], dim=1)
        return x + self.positions[:, : x.shape[1]]


class ClassToken(Odd):
    again = ("token.first", "token.positions")

    def add_odd(self):
        self.token = Token()

    def odd(self, x, mask, ids):
        return self.token(x).tanh()


class Biased(nn.Module):
    """Attention whose scores get a learned bias, looked up once for all examples."""

    def __init__(self):
        super().__init__()
        self.distance = nn.Embedding(40, 1)
        self.project = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, mask):
        place = torch.arange(x.shape[1])
        bias = self.distance(place[:, None] - place[None, :] + 20).permute(2, 0, 1)
        scores = self.project(x) @ x.mT + bias + (mask.mT - 1) * 1e9
        return scores.softmax(-1) @ x


class RelativePositions(Odd):
    """A table that is looked up without examples: the module around it has them."""

    again = ("attention.distance.weight",)

    def add_odd(self):
        self.attention = Biased()

    def odd(self, x, mask, ids):
        return self.attention(x, mask=mask)


class Handing(Biased):
    """The same, handing its bias on for later layers to use, as T5 does."""

    def forward(self, x, mask):
        place = torch.arange(x.shape[1])
        bias = self.distance(place[:, None] - place[None, :] + 20).permute(2, 0, 1)
        scores = self.project(x) @ x.mT + bias + (mask.mT - 1) * 1e9
        return scores.softmax(-1) @ x, bias


class RelativePositionsHandedOn(Odd):
    """One row for all examples comes out of the module that runs again."""

    again = ("attention.distance.weight",)

    def add_odd(self):
        self.attention = Handing()

    def odd(self, x, mask, ids):
        x, bias = self.attention(x, mask=mask)
        return (x @ x.mT + bias + (mask.mT - 1) * 1e9).softmax(-1) @ x


class Container(nn.Module):
    """Holds its child's bias, and lets the child add it, as masked language models do."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(WIDTH, WIDTH)
        self.bias = self.project.bias

    def forward(self, x):
        return self.project(x)


class HeldTwice(Odd):
    def add_odd(self):
        self.container = Container()

    def odd(self, x, mask, ids):
        return self.container(x).tanh()


class HeldAndUsedTwice(Odd):
    """The container adds it once more: the child's rule alone does not hold."""

    loose = ("container.bias",)

    def add_odd(self):
        self.container = Container()

    def odd(self, x, mask, ids):
        return (self.container(x) + self.container.bias).tanh()


class Convolutions(Odd):
    """Over tokens, causal: one for each feature, and a full one on twofold rows."""

    def add_odd(self):
        self.each = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH, padding=2)
        self.full = nn.Conv1d(WIDTH, WIDTH, 2, padding=1, stride=1)

    def odd(self, x, mask, ids):
        length = x.shape[1]
        x = (x * mask).mT
        return self.full(self.each(x)[..., :length].tanh())[..., :length].mT


class PaddingIndex(Odd):
    """PyTorch gives the row at `padding_idx` no gradient, whatever token it stands for."""

    def add_odd(self):
        self.second = nn.Embedding(VOCABULARY, WIDTH, padding_idx=4)

    def odd(self, x, mask, ids):
        return x * self.second(ids)


class PaddingLeaks(Odd):
    """The mean runs over padding too: batched, it would be another model."""

    loose = ("embed.weight", "classifier.weight", "classifier.bias")

    def odd(self, x, mask, ids):
        return x.mean(1, keepdim=True).expand_as(x)


class PaddingMovesLogits(Odd):
    """Padding changes what is predicted, but no gradient of the logits."""

    loose = ("embed.weight", "classifier.weight", "classifier.bias")

    def forward(self, input_ids, attention_mask):
        logits = super().forward(input_ids, attention_mask).logits
        return SimpleNamespace(
            logits=logits + torch.arange(CLASSES) * (1 - attention_mask).sum(1, keepdim=True)
        )


class BatchesFail(Odd):
    """It runs for one example only."""

    loose = ("embed.weight", "classifier.weight", "classifier.bias")

    def odd(self, x, mask, ids):
        assert len(x) == 1
        return x


class PaddingHasNoGradient(Odd):
    """The gradient is not a number where there is padding, though the prediction is right."""

    loose = ("embed.weight", "classifier.weight", "classifier.bias")

    def odd(self, x, mask, ids):
        return torch.where(mask > 0, x * (x * mask).square().sum(-1, keepdim=True).sqrt(), 0)


class WritesIntoOutputs(Odd):
    """As ResNet adds to what a norm returns, and DeBERTa divides a view of what a layer returns."""

    again = ("norm.weight", "norm.bias", "shared.weight")

    def add_odd(self):
        self.norm = nn.GroupNorm(1, WIDTH)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.shared = nn.Embedding(1, WIDTH)

    def odd(self, x, mask, ids):
        table = self.shared(torch.zeros(1, 1, dtype=torch.long))
        y = self.project(table + x).transpose(1, 2)
        y /= 2.0
        y = y.transpose(1, 2)
        pooled = self.norm((y * mask).sum(1))
        pooled += 1.0
        return y * pooled[:, None, :]


class ForeignNorms(Odd):
    """Modules called …Norm that do not act along the last axis, or want an exact weight shape."""

    again = ("group.weight", "group.bias", "rms.weight")

    def add_odd(self):
        self.group = nn.GroupNorm(2, WIDTH)
        self.rms = nn.RMSNorm(WIDTH)

    def odd(self, x, mask, ids):
        pooled = self.group((x * mask).sum(1))
        return self.rms(x) + pooled[:, None, :]


class AllOdd(nn.Module):
    """No parameter has a rule."""

    loose = ("table", "head")
    again = ()

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(VOCABULARY, WIDTH))
        self.head = nn.Parameter(torch.zeros(WIDTH, CLASSES))

    def forward(self, input_ids, attention_mask):
        mask = attention_mask.unsqueeze(-1).to(self.head.dtype)
        x = (self.table[input_ids].tanh() * mask).sum(1)
        return SimpleNamespace(logits=x @ self.head)


CASES = [*(case for case in Odd.__subclasses__() if case.__module__ == __name__), AllOdd]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_odd_models_are_measured_exactly_and_named_in_the_log(case, caplog):
    model, examples = tiny.perturbed(case()), tiny.ragged(9)
    expected = oracles.exact_classifier(model, examples)
    for size in (1, 2, 4, 6):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="fisher_mergekit"):
            session = tiny.session_for(model)
            totals = session.run(examples, size)
        found = {name: totals[p] for name, p in model.named_parameters()}
        oracles.assert_same_fishers(found, expected)
        assert sorted(session.loose) == sorted(case.loose)
        said = [record.message for record in caplog.records]
        if any(
            line.startswith("The whole model is measured one example at a time") for line in said
        ):
            assert len(session.loose) == len(found)
            continue
        assert len(said) == len(case.loose)
        for name in case.loose:
            assert any(
                line.startswith(f"{name} is measured one example at a time") for line in said
            )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_more_digits_make_verification_no_milder(case):
    model, examples = tiny.perturbed(case()).double(), tiny.ragged(9)
    found = tiny.measured(model, examples, batch_size=4, fast=False)
    oracles.assert_same_fishers(found, oracles.exact_classifier(model, examples))


@pytest.mark.parametrize("estimator", ["sampled", "empirical"])
def test_the_loop_takes_the_same_outcomes_as_the_batch(estimator):
    """Half of the parameters are measured in batches, half alone: of the same y."""
    model, examples = tiny.perturbed(BareParameter()), tiny.ragged(9)
    tied = tiny.measured(model, examples, estimator, batch_size=4, fast=False)
    alone = tiny.measured(model, examples, estimator, batch_size=1, fast=False)
    oracles.assert_same_fishers(tied, alone)


class RoutedOnce(Odd):
    """An expert that only the last, shortest batch reaches, with as many tokens as examples.

    Its two rows are two tokens of one example. Taken for two examples, they would be squared apart.
    """

    loose = ("expert.weight", "expert.bias")

    def add_odd(self):
        self.expert = nn.Linear(WIDTH, WIDTH)

    def odd(self, x, mask, ids):
        chosen = ids == 1
        if not chosen.any():
            return x
        return x.masked_scatter(chosen.unsqueeze(-1), self.expert(x[chosen]))


def test_a_layer_first_reached_late_is_not_trusted_unverified():
    rows = [[5] * 9, [6] * 8, [7] * 7, [8] * 6, [1, 1, 9], [9, 8, 4]]
    examples = [tiny.labelled(i, ids) for i, ids in enumerate(rows)]
    model = tiny.perturbed(RoutedOnce())
    found = tiny.measured(model, examples, batch_size=2, fast=False)
    oracles.assert_same_fishers(found, oracles.exact_classifier(model, examples))


class TableOfAnother(Odd):
    """A table in a module that is never called: another one looks it up, for a single token."""

    loose = ("tables.some",)

    def add_odd(self):
        self.tables = nn.ParameterDict({"some": torch.zeros(WIDTH), "none": torch.zeros(WIDTH)})

    def odd(self, x, mask, ids):
        chosen = (ids == 1).unsqueeze(-1)
        return x + chosen * self.tables["some"].sin() if chosen.any() else x


@pytest.mark.parametrize("number", [1, 2, 4, 5])
@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_a_parameter_that_verification_does_not_use_is_not_taken_for_unused(number, estimator):
    """Not in the longest, the middle and the shortest text, but in another one."""
    rows = [[5] * 9, [6, 5] * 4, [7, 8] * 3 + [9], [8] * 6, [9, 8, 4, 5, 6], [9, 8, 4, 2], [9, 8]]
    rows[number][0] = 1
    examples = [tiny.labelled(i, ids) for i, ids in enumerate(rows)]
    model = tiny.perturbed(TableOfAnother())
    session = tiny.session_for(model, estimator)
    totals = session.run(examples, 2)
    assert session.loose == ("tables.some",)
    plain = tiny.session_for(model, estimator)
    plain._taps.loosen_all("to compare")
    expected = plain.run(examples, 1)
    names = dict(model.named_parameters())
    oracles.assert_same_fishers(
        {n: totals[p] for n, p in names.items()}, {n: expected[p] for n, p in names.items()}
    )
    assert totals[names["tables.some"]].all()


class Twice(nn.Linear):
    """What a rule cannot know of a subclass: its gradients are twice what the rule finds."""

    def forward(self, x):
        return super().forward(x) + nn.functional.linear(x, 1 * self.weight, 1 * self.bias)


class Faint(Odd):
    """A rule that is wrong where gradients are small beside the classifier's."""

    strength = 1e-6

    def add_odd(self):
        self.twice = Twice(WIDTH, WIDTH)

    def odd(self, x, mask, ids):
        return x + self.strength * self.twice(x)


@pytest.mark.parametrize(
    ("dtype", "strength", "tolerance"),
    [(torch.float32, 1e-6, 1e-4), (torch.bfloat16, 0.05, 0.1), (torch.float16, 0.01, 0.02)],
)
def test_a_wrong_rule_is_seen_however_small_its_gradients_are(dtype, strength, tolerance):
    model, examples = tiny.perturbed(Faint()), tiny.ragged(9)
    model.strength = strength
    expected = oracles.exact_classifier(model, examples)
    session = tiny.session_for(model.to(dtype))
    totals = session.run(examples, 4)
    assert session.loose == ()
    assert set(session.again) == {"twice.weight", "twice.bias"}
    for name, parameter in model.twice.named_parameters():
        error = oracles.rms(totals[parameter].double() - expected[f"twice.{name}"])
        assert error < tolerance * oracles.rms(expected[f"twice.{name}"])


class TwoHeads(Odd):
    """Only the second of two outputs comes from a layer whose rule is wrong."""

    def __init__(self):
        super().__init__()
        self.classifier, self.second = nn.Linear(WIDTH, 1), Twice(WIDTH, 1)

    def forward(self, input_ids, attention_mask):
        mask = attention_mask.unsqueeze(-1).to(self.second.weight.dtype)
        x = (self.embed(input_ids).tanh() * mask).sum(1)
        return SimpleNamespace(logits=torch.cat([self.classifier(x), self.second(x)], dim=1))


def test_rules_are_verified_from_every_start_of_the_estimator():
    model, examples = tiny.perturbed(TwoHeads()), tiny.ragged(9)

    def outputs(output, example):
        return [(1.0, y) for y in output.logits[0]]

    session = tiny.session_for(model)
    session.likelihood = Regression()
    totals = session.run(examples, 4)
    found = {name: totals[p] for name, p in model.named_parameters()}
    oracles.assert_same_fishers(found, oracles.expectation(model, examples, outputs))
    assert {"second.weight", "second.bias"} <= set(session.again)


class Crowded(Odd):
    """An expert that takes the first four examples of a batch and no more."""

    def add_odd(self):
        self.expert = nn.Linear(WIDTH, WIDTH)

    def odd(self, x, mask, ids):
        has_room = torch.arange(len(x))[:, None, None] < 4
        return x + self.expert(x).tanh() * has_room


@pytest.mark.parametrize(("size", "moves"), [(4, False), (6, True)])
def test_a_full_batch_is_compared_with_its_examples_alone(size, moves):
    """The three examples that rules are verified on do not fill the expert."""
    model, examples = tiny.perturbed(Crowded()), tiny.ragged(12)
    session = tiny.session_for(model)
    totals = session.run(examples, size)
    found = {name: totals[p] for name, p in model.named_parameters()}
    oracles.assert_same_fishers(found, oracles.exact_classifier(model, examples))
    assert len(session.loose) == (len(found) if moves else 0)
