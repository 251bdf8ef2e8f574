"""Measured factors of linear layers, against plain PyTorch on single examples in float64."""

from __future__ import annotations

import copy

import factor_oracle
import pytest
import tiny
import torch
from models import FAMILIES
from torch import nn

from fisher_mergekit.measure.batches import collate
from fisher_mergekit.measure.factors import Factors
from fisher_mergekit.measure.inputs import Use, add_moment, fill_lower
from fisher_mergekit.measure.likelihoods import likelihood_for

pytestmark = pytest.mark.slow  # exhaustive: not needed at every change


def factors_of(
    model, examples, estimator="exact", *, outputs=True, squares=False, batch_size=3, fast=True
):
    """Measure factors; return them, and the squares if they are measured in the same pass."""
    session = tiny.session_for(model, estimator, squares=squares, factors=outputs)
    found = session.run(examples, batch_size)
    if fast:
        assert not session.factors.is_alone
        assert session._have_own_passes is False
    return session.factors, found


def by_name(model, factors):
    names = {p: n for n, p in model.named_parameters()}
    inputs = {names[p]: g.total for p, g in factors.groups.items() if not factors.uses[p].is_lookup}
    return inputs, {names[p]: total for p, total in factors.outputs.items() if names[p] in inputs}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    nothing = 1e-11 * max(value.norm() for value in expected.values())  # zero on paper
    for name, value in expected.items():
        error = (found[name].double() - value).norm()
        assert error <= max(1e-5 * value.norm(), nothing), name


def oracle_of(model, examples, outcomes):
    found = factor_oracle.measure(in_float64(model), examples, outcomes)
    return found.inputs, found.rows, found.outputs


def in_float64(model):
    double = copy.deepcopy(model).double().requires_grad_(True)
    if hasattr(double, "set_experts_implementation"):
        double.set_experts_implementation("eager")
    return double


@pytest.mark.parametrize("squares", [False, True], ids=["alone", "with the Fisher"])
@pytest.mark.parametrize("architecture", tiny.CLASSIFIERS)
def test_classifiers(architecture, squares):
    model, examples = tiny.classifier(architecture), tiny.ragged(5)
    inputs, rows, outputs = oracle_of(model, examples, factor_oracle.classes)
    factors, _ = factors_of(model, examples, squares=squares)
    found_inputs, found_outputs = by_name(model, factors)
    assert_same(found_inputs, inputs)
    assert_same(found_outputs, outputs)
    names = {p: n for n, p in model.named_parameters()}
    counts = {names[p]: g.rows for p, g in factors.groups.items() if names[p] in inputs}
    assert counts == rows


def language_model(name):
    if name in tiny.CAUSAL_LMS:
        return tiny.causal_lm(name)
    sizes = {"moe_intermediate_size": 8} if name == "qwen3_moe" else {}
    return tiny.build(*FAMILIES[name], pad_token_id=tiny.PAD, **sizes)


@pytest.mark.parametrize("squares", [False, True], ids=["alone", "with the Fisher"])
@pytest.mark.parametrize("name", [*tiny.CAUSAL_LMS, "mixtral", "qwen3_moe"])
def test_language_models(name, squares):
    model, examples = language_model(name), tiny.ragged_texts(5)
    likelihood = likelihood_for(type(model).__name__, model.config)
    drawn = factor_oracle.drawn_by(likelihood)
    inputs, _, outputs = oracle_of(model, examples, drawn)
    factors, _ = factors_of(model, examples, "sampled", squares=squares)
    found_inputs, found_outputs = by_name(model, factors)
    assert_same(found_inputs, inputs)
    assert_same(found_outputs, outputs)


def test_queries_keys_and_values_share_one_sum_and_so_do_gate_and_up():
    model, examples = tiny.causal_lm("untied Llama"), tiny.ragged_texts(4)
    factors, _ = factors_of(model, examples, outputs=False)
    layer = model.model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    for together in (
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [mlp.gate_proj, mlp.up_proj],
    ):
        assert len({id(factors.groups[m.weight]) for m in together}) == 1
    apart = [attention.q_proj, attention.o_proj, mlp.gate_proj, mlp.down_proj, model.lm_head]
    assert len({id(factors.groups[m.weight]) for m in apart}) == len(apart)


def test_an_embedding_has_a_diagonal_of_token_counts():
    model, examples = tiny.causal_lm("untied Llama"), tiny.ragged_texts(6)
    factors, _ = factors_of(model, examples, outputs=False)
    table = model.model.embed_tokens.weight
    ids = torch.cat([e.inputs["input_ids"][0] for e in examples])
    expected = torch.bincount(ids, minlength=len(table)).float()
    assert torch.equal(factors.groups[table].total, expected)


def test_a_tied_head_is_a_linear_layer():
    model, examples = tiny.causal_lm("tied GPT-2"), tiny.ragged_texts(6)
    factors, _ = factors_of(model, examples, outputs=False)
    group = factors.groups[model.transformer.wte.weight]
    assert group.total.shape == (model.config.n_embd, model.config.n_embd)
    assert group.use.axis == -1


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_batches_and_padding_change_nothing(batch_size):
    model, examples = tiny.classifier(), tiny.ragged(7)
    expected, _ = factors_of(model, examples, batch_size=4)
    found, _ = factors_of(model, examples, batch_size=batch_size)
    for one, other in zip(by_name(model, found), by_name(model, expected), strict=True):
        assert_same(one, other)


def test_the_fisher_of_a_shared_pass_is_that_of_its_own():
    model, examples = tiny.classifier(), tiny.ragged(7)
    alone = tiny.measured(model, examples, batch_size=3)
    _, squares = factors_of(model, examples, squares=True)
    for name, parameter in model.named_parameters():
        assert torch.equal(squares[parameter], alone[name])


def test_nothing_goes_backward_for_inputs_alone():
    model, examples = tiny.classifier(), tiny.ragged(4)
    model.bert.encoder.layer[0].output.dense.register_forward_hook(
        lambda module, args, y: pytest.fail("a gradient") if y.requires_grad else None
    )
    factors, found = factors_of(model, examples, outputs=False)
    assert not found
    assert not factors.outputs


class Chunked(nn.Module):
    """Attends to chunks of four tokens, padded up to that: a batch gives layers other rows."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(30, 6)
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, input_ids, attention_mask=None):
        x = self.table(input_ids)
        x = nn.functional.pad(x, (0, 0, 0, -x.shape[1] % 4))
        x = self.inner(x.reshape(-1, 4, 6)).reshape(len(input_ids), -1, 6)
        x = x[:, : input_ids.shape[1]] * attention_mask[:, :, None]
        return type("Output", (), {"logits": self.head(x.sum(1))})


def test_rows_that_depend_on_the_batch_are_measured_alone(caplog):
    torch.manual_seed(0)
    model, examples = Chunked().eval(), tiny.ragged(5)
    inputs, _, outputs = oracle_of(model, examples, factor_oracle.classes)
    for squares in (False, True):
        factors, _ = factors_of(model, examples, squares=squares, fast=False)
        assert factors.is_alone
        found_inputs, found_outputs = by_name(model, factors)
        assert_same(found_inputs, inputs)
        assert_same(found_outputs, outputs)
    assert "inner.weight does not get in a batch what it gets alone" in caplog.text


class Fickle(nn.Module):
    """Gives two layers one tensor for longer texts, and two tensors for shorter ones."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(30, 6)
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, input_ids, attention_mask=None):
        x = (self.table(input_ids) * attention_mask[:, :, None]).sum(1)
        other = x if input_ids.shape[1] > 5 else x * 2
        return type("Output", (), {"logits": self.one(x)[:, :3] + self.two(other)})


@pytest.mark.parametrize("squares", [False, True])
def test_layers_that_share_inputs_only_sometimes(squares):
    torch.manual_seed(0)
    model, examples = Fickle().eval(), [e for e in tiny.ragged(9) if len(e) > 5]
    inputs, _, outputs = oracle_of(model, examples, factor_oracle.classes)
    factors, _ = factors_of(model, examples, squares=squares)
    assert factors.groups[model.one.weight] is factors.groups[model.two.weight]
    assert_same(by_name(model, factors)[0], inputs)
    assert_same(by_name(model, factors)[1], outputs)
    short = [e for e in tiny.ragged(9) if len(e) <= 5]
    session = tiny.session_for(model, squares=squares, factors=True)
    session.verify(examples)
    session.verify = lambda examples: None
    session.run(short, 2)
    inputs, _, outputs = oracle_of(model, short, factor_oracle.classes)
    assert session.factors.is_separate
    assert_same(by_name(model, session.factors)[0], inputs)
    assert_same(by_name(model, session.factors)[1], outputs)


def test_wide_outputs_keep_their_diagonal(monkeypatch):
    model, examples = tiny.causal_lm("untied Llama"), tiny.ragged_texts(4)
    whole, _ = factors_of(model, examples, "sampled")
    monkeypatch.setattr("fisher_mergekit.measure.factors.WIDEST", 20)
    found, _ = factors_of(model, examples, "sampled")
    head = model.lm_head.weight
    torch.testing.assert_close(found.outputs[head], whole.outputs[head].diagonal())


def test_checkpointed_layers_count_once():
    from fisher_mergekit.measure.checkpointing import checkpoint_layers

    model, examples = tiny.causal_lm("untied Llama"), tiny.ragged_texts(5)
    expected, _ = factors_of(model, examples, "sampled")
    checkpoint_layers(model)
    for squares in (False, True):
        found, _ = factors_of(model, examples, "sampled", squares=squares)
        for one, other in zip(by_name(model, found), by_name(model, expected), strict=True):
            assert_same(one, other)


@pytest.mark.parametrize("squares", [False, True])
def test_half_precision_scales_what_would_vanish(squares):
    model, examples = tiny.classifier(), tiny.ragged(5)
    expected, _ = factors_of(model, examples)
    found, _ = factors_of(model.half(), examples, squares=squares)
    for one, other in zip(by_name(model, found), by_name(model, expected), strict=True):
        for name, value in other.items():
            assert (one[name] - value).norm() <= 0.05 * value.norm(), name


@pytest.mark.parametrize("batches", [1, 10, 200])
def test_float32_sums_stay_within_the_bound_of_the_docs(batches):
    generator = torch.Generator().manual_seed(0)
    total, exact = torch.zeros(300, 300), torch.zeros(300, 300, dtype=torch.float64)
    sizes, shift = torch.logspace(-2, 1, 300), torch.linspace(-3, 3, 300)
    for _ in range(batches):
        rows = torch.randn(256, 300, generator=generator) * sizes + shift
        add_moment(total, rows, Use())
        exact += rows.double().mT @ rows.double()
    fill_lower(total)
    assert torch.equal(total, total.mT)
    size = exact.diagonal().sqrt()
    error = ((total.double() - exact) / (size[:, None] * size)).abs().max()
    assert 0 < error < (batches + 30) * 2**-24


def test_factors_without_parameters_cost_nothing():
    factors = Factors({})
    factors.begin(collate(tiny.ragged(2), tiny.PAD))
    assert not factors.groups
