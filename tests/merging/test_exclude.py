"""The advice which tensors to exclude: short, and taking no more than it must."""

import pytest

from fisher_mergekit.merging.exclude import advice, shortest_patterns, unmatched

BERT = [
    "bert.embeddings.word_embeddings.weight",
    "bert.embeddings.position_embeddings.weight",
    "bert.encoder.layer.0.output.dense.weight",
    "bert.encoder.layer.1.output.dense.weight",
    "bert.pooler.dense.weight",
    "classifier.weight",
    "classifier.bias",
]


@pytest.mark.parametrize(
    ("offenders", "patterns"),
    [
        (["classifier.weight", "classifier.bias"], ["classifier"]),
        (["classifier.bias"], ["classifier.bias"]),
        (["bert.embeddings.position_embeddings.weight"], ["position_embeddings"]),
        (["bert.encoder.layer.1.output.dense.weight"], ["bert.encoder.layer.1"]),
        (["bert.pooler.dense.weight", "classifier.bias"], ["pooler", "classifier.bias"]),
    ],
)
def test_shortest_patterns(offenders, patterns):
    assert shortest_patterns(offenders, BERT) == patterns


def test_names_that_no_pattern_can_tell_apart():
    names = ["pre_classifier.weight", "pre_classifier.bias", "classifier.weight", "classifier.bias"]
    offenders = ["classifier.weight", "classifier.bias"]
    assert shortest_patterns(offenders, names) == ["classifier"]
    sentence = advice(offenders, names, ["pooler"], has_base=True)
    assert "`exclude: [pooler, classifier]`" in sentence
    assert "(it takes pre_classifier.weight, pre_classifier.bias too)" in sentence


def test_unmatched_offers_the_nearest():
    (message,) = unmatched(["classifer", "pooler"], BERT)
    assert message.endswith("Did you mean 'classifier'?")
    assert unmatched(["x.layer.1"], BERT)[0].startswith("exclude: 'x.layer.1'")
