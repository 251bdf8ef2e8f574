"""Factors where examples, layers or memory are not as usual, against plain PyTorch in float64."""

from __future__ import annotations

from types import SimpleNamespace

import factor_oracle
import oracles
import pytest
import tiny
import torch
from torch import nn

from fisher_mergekit.errors import MeasureError
from fisher_mergekit.measure import factors as factors_module
from fisher_mergekit.measure import limits
from fisher_mergekit.measure.batches import Example
from fisher_mergekit.measure.likelihoods import likelihood_for
from fisher_mergekit.measure.likelihoods.causal_lm import next_tokens

pytestmark = pytest.mark.slow  # exhaustive: not needed at every change

WIDTH = 6


def measured(model, examples, estimator="exact", *, squares=False, outputs=True, batch_size=3):
    session = tiny.session_for(model, estimator, squares=squares, factors=outputs)
    session.run(examples, batch_size)
    return session


def assert_right(session, examples, outcomes=factor_oracle.classes, *, tolerance=1e-5):
    """Compare with the oracle all that it finds, which has to be all that is described."""
    model, factors = session.model, session.factors
    names = {p: name for name, p in model.named_parameters()}
    oracle = factor_oracle.measure(oracles.in_float64(model), examples, outcomes)
    groups = {names[p]: g for p, g in factors.groups.items() if not factors.uses[p].is_lookup}
    assert groups.keys() == oracle.inputs.keys()
    for name, expected in oracle.inputs.items():
        found = groups[name].total.double()
        assert (found - expected).norm() <= tolerance * expected.norm(), name
        assert torch.equal(groups[name].rows.double(), oracle.rows[name]), name
    if factors.has_outputs:
        outputs = {names[p]: total for p, total in factors.outputs.items()}
        largest = max(expected.norm() for expected in oracle.outputs.values())
        for name, expected in oracle.outputs.items():
            found = outputs.get(name, torch.zeros(())).double()
            allowed = max(tolerance * expected.norm(), 1e-11 * largest)
            assert (found - expected).norm() <= allowed, name


def of_lengths(*lengths):
    generator = torch.Generator().manual_seed(5)
    return [
        tiny.labelled(n, torch.randint(1, 24, (length,), generator=generator).tolist(), n % 3)
        for n, length in enumerate(lengths)
    ]


SHAPES = {
    "one example": ((5,), 3),
    "one token": ((1,), 3),
    "one token each": ((1, 1, 1, 1), 3),
    "one token and more": ((1, 4, 1, 2), 4),
    "one length": ((4, 4, 4, 4), 2),
    "batches of one": ((3, 5, 2), 1),
    "the last is shorter": ((4, 4, 4, 4, 4, 4, 2), 7),
}


@pytest.mark.parametrize("squares", [False, True], ids=["alone", "with the Fisher"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "architecture", ["BertForSequenceClassification", "LlamaForSequenceClassification"]
)
def test_lengths(architecture, shape, squares):
    lengths, batch_size = SHAPES[shape]
    examples = of_lengths(*lengths)
    session = measured(
        tiny.classifier(architecture), examples, squares=squares, batch_size=batch_size
    )
    assert not session.factors.is_alone
    assert_right(session, examples)


def given_label(logits, batch):
    return [(1.0, logits[0].log_softmax(-1)[batch.outcome[0]])]


def drawn_label(logits, batch):
    likelihood = likelihood_for("ForSequenceClassification")
    return [(1.0, logits[0].log_softmax(-1)[likelihood.sample(logits.detach(), batch, 0)[0]])]


@pytest.mark.parametrize("squares", [False, True], ids=["alone", "with the Fisher"])
@pytest.mark.parametrize(
    ("estimator", "outcomes"), [("empirical", given_label), ("sampled", drawn_label)]
)
def test_estimators(estimator, outcomes, squares):
    examples = tiny.ragged(6)
    session = measured(tiny.classifier(), examples, estimator, squares=squares)
    assert_right(session, examples, outcomes)


@pytest.mark.parametrize("squares", [False, True], ids=["alone", "with the Fisher"])
def test_a_prompt_has_inputs_and_is_not_predicted(squares):
    model, examples = tiny.causal_lm("untied Llama"), tiny.ragged_texts(6, prompt=True)
    likelihood = likelihood_for(type(model).__name__, model.config)
    session = measured(model, examples, "sampled", squares=squares)
    assert_right(session, examples, factor_oracle.drawn_by(likelihood))


@pytest.mark.parametrize("squares", [False, True], ids=["alone", "with the Fisher"])
def test_bfloat16_is_summed_in_float32(squares):
    model, examples = tiny.classifier().bfloat16(), tiny.ragged(6)
    session = measured(model, examples, squares=squares)
    assert all(group.total.dtype == torch.float32 for group in session.factors.groups.values())
    assert_right(session, examples, tolerance=0.1)


def test_weights_of_nan_are_an_error():
    model = tiny.classifier()
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] = torch.nan
    with pytest.raises(MeasureError, match=r"is not finite\. Look for NaN in the weights"):
        measured(model, tiny.ragged(4), outputs=False)


@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize("squares", [False, True], ids=["alone", "with the Fisher"])
@pytest.mark.parametrize("fails_at", [1, 15, 35])
def test_a_batch_that_does_not_fit_is_counted_once(monkeypatch, fails_at, squares, outputs):
    model, examples = tiny.classifier(), tiny.ragged(9)
    session = tiny.session_for(model, squares=squares, factors=outputs)
    session.verify(examples)
    session.verify = lambda examples: None
    add, calls, steps = factors_module.add_moment, [], []

    def failing(*args):
        calls.append(1)
        if len(calls) == fails_at:
            raise torch.OutOfMemoryError("no memory")
        add(*args)

    monkeypatch.setattr(factors_module, "add_moment", failing)
    monkeypatch.setattr(limits, "CPU_TOKENS", 24)
    session.run(examples, "auto", steps.append)
    assert sum(steps) == len(examples)
    assert len(calls) > fails_at
    assert_right(session, examples)


class Odd(nn.Module):
    """A classifier of the sum over tokens of what `odd` makes of them."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(30, WIDTH), nn.Linear(WIDTH, 3)
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids, attention_mask):
        mask = attention_mask[:, :, None].to(self.head.weight.dtype)
        x = self.odd(self.table(input_ids), mask)
        return SimpleNamespace(logits=self.head((x * mask).sum(1)))


class Twice(Odd):
    """One layer is called twice, another shares the first call's inputs only."""

    def odd(self, x, mask):
        return self.one(self.one(x).tanh()) + self.two(x)


class Never(Odd):
    """A layer is never called."""

    def odd(self, x, mask):
        return self.one(x)


class Seldom(Odd):
    """A layer is called for long batches only, and by nobody in a batch of short ones."""

    def odd(self, x, mask):
        return self.one(x) if x.shape[1] < 5 else self.one(x) + self.two(x)


class Flat(Odd):
    """All tokens of all examples in one list of rows."""

    def odd(self, x, mask):
        return self.one(x.flatten(0, 1)).view(x.shape)


class Packed(Odd):
    """Padding is left out before the layer."""

    def odd(self, x, mask):
        is_token = mask[:, :, 0] != 0
        y = torch.zeros_like(x)
        y[is_token] = self.one(x[is_token]).tanh()
        return y


class Written(Odd):
    """Between two layers something is written into what both are given."""

    def odd(self, x, mask):
        x = x * 2
        y = self.one(x)
        x.mul_(0.5)
        return y + self.two(x)


class Scaled(Odd):
    """What the first layers give is written into, as DeBERTa does."""

    def odd(self, x, mask):
        x = x.view(x.shape)
        x *= 0.5
        y = self.one(torch.ones_like(x)).view(x.shape)
        y /= 3.0
        z = self.two(x).view(x.shape)
        z *= 2.0
        return y + z


class Own(Odd):
    """Multiplies by a matrix of its own, either way around, and by a cast of one."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = (nn.Parameter(torch.randn(WIDTH, WIDTH)) for _ in range(2))
            self.bias = nn.Parameter(torch.randn(WIDTH))

        def forward(self, x, gate):
            y = (x @ self.left.T + self.bias).tanh() @ self.right
            return y * gate

    def __init__(self):
        super().__init__()
        self.inner = self.Inner()

    def odd(self, x, mask):
        return self.inner(self.one(x), x.sigmoid())


class Table(Odd):
    """A matrix that is only added, in a module without a rule."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.positions = nn.Parameter(torch.randn(16, WIDTH))

        def forward(self, x):
            return x + self.positions[: x.shape[1]]

    def __init__(self):
        super().__init__()
        self.inner = self.Inner()

    def odd(self, x, mask):
        return self.one(self.inner(x))


class Concatenated(Odd):
    """All tokens stand in one row, as those of pictures of several sizes do."""

    def odd(self, x, mask):
        is_token = mask[:, :, 0] != 0
        y = torch.zeros_like(x)
        y[is_token] = self.one(x[is_token][None])[0].tanh()
        return y


ODD = (Twice, Never, Seldom, Flat, Packed, Scaled, Own, Table, Concatenated)


@pytest.mark.parametrize("outputs", [False, True], ids=["inputs", "and outputs"])
@pytest.mark.parametrize("squares", [False, True], ids=["alone", "with the Fisher"])
@pytest.mark.parametrize("model", ODD, ids=lambda m: m.__name__)
@pytest.mark.parametrize("lengths", [(3, 9, 5, 2, 7), (4, 4, 4, 4, 4, 4, 2)], ids=str)
def test_odd_layers(model, lengths, squares, outputs):
    torch.manual_seed(0)
    model, examples = model().eval(), of_lengths(*lengths)
    session = measured(model, examples, squares=squares, outputs=outputs)
    assert_right(session, examples)
    assert not session.factors.is_alone or isinstance(model, Seldom | Packed | Concatenated)


def test_what_is_written_into_between_two_layers_is_not_shared():
    """As it can be without gradients: autograd itself refuses it."""
    torch.manual_seed(0)
    model, examples = Written().eval(), of_lengths(3, 9, 5, 2, 7)
    session = measured(model, examples, outputs=False)
    assert_right(session, examples, factor_oracle.nothing)
    groups = session.factors.groups
    assert groups[model.one.weight] is not groups[model.two.weight]


class Translator(nn.Module):
    """Two inputs of tokens, each with layers of its own."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(24, WIDTH), nn.Linear(WIDTH, 24)
        self.source, self.target = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids, attention_mask, decoder_input_ids):
        x = self.source(self.table(input_ids)).tanh() * attention_mask[:, :, None]
        y = self.target(self.table(decoder_input_ids)).tanh()
        return SimpleNamespace(logits=self.head(x.sum(1, keepdim=True) + y))


def translation(number, source, target):
    generator = torch.Generator().manual_seed(number)

    def ids(length):
        return torch.randint(1, 24, (1, length), generator=generator)

    given, wanted = ids(target), ids(target)[0]
    inputs = {"input_ids": ids(source), "decoder_input_ids": given}
    return Example(number, inputs, torch.ones(target, dtype=torch.bool), wanted)


@pytest.mark.parametrize("squares", [False, True], ids=["alone", "with the Fisher"])
def test_lengths_of_source_and_target_that_happen_to_be_the_same(squares, caplog):
    """What tells padding is the same in all that is verified, and not in a later batch."""
    torch.manual_seed(0)
    model = Translator().eval()
    alike = [translation(n, 5, 5) for n in range(4)]
    unlike = [translation(4, 2, 6), translation(5, 6, 2), translation(6, 4, 4)]
    session = tiny.session_for(model, "empirical", squares=squares, factors=True)
    session.likelihood = likelihood_for("T5ForConditionalGeneration")
    session.verify(alike)
    session.verify = lambda examples: None
    session.run([*alike, *unlike], 3)
    assert not session.factors.is_alone

    def outcomes(logits, batch):
        log_p = logits[0].log_softmax(-1)
        return [(1.0, log_p[torch.arange(len(log_p)), batch.outcome[0]].sum())]

    assert_right(session, [*alike, *unlike], outcomes)


def test_texts_of_one_token_predict_nothing():
    model = tiny.causal_lm("untied Llama")
    examples = [Example(0, {"input_ids": torch.tensor([[5]])}, *next_tokens(torch.tensor([5]), 0))]
    session = measured(model, examples, "sampled")
    head = model.lm_head.weight
    assert session.factors.groups[head].rows == 1
    assert not session.factors.outputs[head].any()
