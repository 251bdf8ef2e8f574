"""Models that fail: in batches only, in the last batch only, or by themselves."""

from __future__ import annotations

import oracles
import pytest
import tiny
import torch
from odd import WIDTH, Odd
from torch import nn

from fisher_mergekit.errors import MeasureError


class WritesInOneExample(Odd):
    """A linear layer returns a view where its input is contiguous: here, in batches of one."""

    def add_odd(self):
        self.table = nn.Embedding(4, WIDTH)
        self.project = nn.Linear(WIDTH, WIDTH)

    def odd(self, x, mask, ids):
        rows = self.project(self.table(torch.arange(4)[None])).transpose(1, 2)
        rows /= 2.0
        return (x @ rows).softmax(-1) @ rows.transpose(1, 2)


def test_writing_into_an_output_can_be_forbidden_in_the_last_batch_only():
    model, examples = tiny.perturbed(WritesInOneExample()), tiny.ragged(7)
    found = tiny.measured(model, examples, batch_size=3)
    oracles.assert_same_fishers(found, oracles.exact_classifier(model, examples))


class RefusesShortTexts(Odd):
    def odd(self, x, mask, ids):
        assert ids.shape[1] > 3, "needs four tokens"
        return x


def test_a_model_that_fails_by_itself_is_refused_and_the_example_named():
    examples = tiny.ragged(7)
    short = min(examples, key=len)
    with pytest.raises(
        MeasureError, match=rf"RefusesShortTexts fails on example {short.number} .*four tokens"
    ):
        tiny.measured(RefusesShortTexts(), examples)


def test_a_model_that_fails_after_verification_is_refused_too():
    """The longest, the middle and the shortest text are well; another of them is not."""

    class RefusesAToken(Odd):
        def odd(self, x, mask, ids):
            assert not (ids == 7).any(), "seven"
            return x

    rows = [[5] * 9, [5] * 8, [5] * 7, [5] * 6, [5] * 5, [5] * 4, [5] * 3]
    rows[1][0] = 7
    examples = [tiny.labelled(number, ids) for number, ids in enumerate(rows)]
    with pytest.raises(MeasureError, match=r"RefusesAToken fails on example 1 .*seven"):
        tiny.measured(RefusesAToken(), examples)
