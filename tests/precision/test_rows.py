"""Rows that not every model has, against Cᵢ = diag(presentᵢ) ⊗ Aᵢ written down whole."""

import dense_oracle
import pytest
import torch

from fisher_mergekit.precision import gram, rows

ROWS, WIDTH = 9, 4


def made(count, seed=0):
    """Return thetas, Grams and who has which row: all of them, some, one, nobody."""
    generator = torch.Generator().manual_seed(seed)
    thetas = [torch.randn(ROWS, WIDTH, generator=generator) for _ in range(count)]
    grams = []
    for _ in range(count):
        x = torch.randn(3 * WIDTH, WIDTH, generator=generator)
        grams.append(x.mT @ x)
    present = [torch.rand(ROWS, generator=generator) < 0.6 for _ in range(count)]
    for i, has in enumerate(present):
        has[0], has[1], has[2] = True, i == 1, False
    return thetas, grams, present


@pytest.mark.parametrize("kind", ["gram", "kfac"])
@pytest.mark.parametrize("lambdas", [[1.0, 2.0], [0.5, 3.0, 1.0], [1.0, 2.0, 0.0]])
def test_against_the_dense_equation(kind, lambdas):
    thetas, grams, present = made(len(lambdas))
    found = rows.solve(kind, thetas, grams, lambdas, present, offdiagonal=0.9)
    counting = [i for i, lam in enumerate(lambdas) if lam]
    anybody = torch.stack([present[i] for i in counting]).any(0)
    matrices = [
        lambdas[i] * torch.kron(
            torch.diag(present[i][anybody].double()), dense_oracle.shrunk(grams[i], 0.9)
        )
        for i in counting
    ]  # fmt: skip
    expected = sum(lambdas[i] * thetas[i].double() for i in counting) / sum(lambdas)
    expected[anybody] = dense_oracle.solution(matrices, [thetas[i][anybody] for i in counting])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], thetas[1][1].double(), rtol=1e-5, atol=1e-6)


def test_what_is_shared_serves_the_rows_that_all_have(monkeypatch):
    thetas, grams, present = made(2)
    lambdas = [1.0, 2.0]
    shared = gram.common(grams, lambdas)
    expected = rows.solve("gram", thetas, grams, lambdas, present)
    calls = []
    original = gram.common
    monkeypatch.setattr(gram, "common", lambda *a, **k: calls.append(a) or original(*a, **k))
    found = rows.solve("gram", thetas, grams, lambdas, present, shared=shared)
    assert torch.equal(found, expected)
    groups = {(bool(a), bool(b)) for a, b in zip(*present, strict=True)}
    assert len(calls) == len(groups - {(True, True)})


def test_all_rows_everywhere_is_the_plain_equation():
    thetas, grams, _ = made(3)
    present = [torch.ones(ROWS, dtype=torch.bool)] * 3
    system = gram.system([(a,) for a in grams], [1, 2, 3])
    expected = rows.equation.solve(system, thetas, [1, 2, 3])
    assert torch.equal(rows.solve("gram", thetas, grams, [1, 2, 3], present), expected)


def test_taken_and_uncoupled():
    factor = torch.arange(9.0).view(3, 3)
    order = torch.tensor([2, rows.ABSENT, 0])
    expected = torch.tensor([[8.0, 0, 6], [0, 0, 0], [2, 0, 0]])
    assert torch.equal(rows.taken(factor, order, (-2, -1)), expected)
    assert torch.equal(rows.taken(factor[:, :1], order, (-2,)), torch.tensor([[6.0], [0], [0]]))
    present = [torch.tensor([True, True, False]), torch.tensor([True, False, True])]
    assert torch.equal(rows.uncoupled(factor, present), torch.diag(factor.diagonal()))
    present = [torch.tensor([True, False, True])] * 2
    expected = factor.clone()
    expected[1, [0, 2]] = expected[[0, 2], 1] = 0
    assert torch.equal(rows.uncoupled(factor, present), expected)
