"""The examples that rules are verified on must be able to show that a rule is wrong."""

from __future__ import annotations

import tiny

from fisher_mergekit.measure.batches import Example
from fisher_mergekit.measure.probe import spread


def example(number: int, length: int, prompt: int = 0) -> Example:
    return tiny.text(number, [1] * length, prompt)


def test_the_probe_is_padded_although_most_texts_are_cut_to_one_length() -> None:
    examples = [example(n, 9) for n in range(90)] + [example(n, 2) for n in range(90, 100)]
    assert {len(e) for e in spread(examples, 3)} == {9, 2}


def test_the_probe_is_of_examples_that_are_scored() -> None:
    examples = [example(n, 9, prompt=9) for n in range(20)] + [example(20, 5, prompt=2)]
    assert [e.number for e in spread(examples, 3)] == [20]


def test_a_single_example_is_its_own_probe() -> None:
    assert [e.number for e in spread([example(7, 1)], 3)] == [7]
