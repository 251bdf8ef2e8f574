"""MiniLM on tweets and on product reviews, three sentiments each: everything is merged."""

from __future__ import annotations

import merge_oracle
import pytest
import torch
from models import read
from oracles import assert_same_fishers, exact_classifier
from real.specialists import EXAMPLES, MAX_LENGTH, Classifiers, assert_better_than_chance, run
from running import assert_close
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fisher_mergekit.measure.batches import Example

pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest.fixture(scope="module")
def merged(domains, workshop):
    out = workshop / "merged-domains"
    said = run("mergekit-yaml", domains.recipe, out)
    assert "task head" in said  # nobody was asked whether it should be merged
    return out


def test_merge_is_the_fisher_average_of_every_tensor(domains: Classifiers, merged):
    thetas, found = domains.thetas, read(merged)
    expected = merge_oracle.merge(thetas, domains.fishers, [1.0, 1.0], list(thetas[0]))
    assert_close(found, expected, rtol=1e-6, atol=1e-7)
    for name, tensor in found.items():
        first, second = (theta[name] for theta in thetas)
        assert not torch.equal(tensor, first), name
        assert not torch.equal(tensor, second), name
        # A key's bias shifts all scores of a query alike: its Fisher is rounding, below the floor.
        isotropic = torch.allclose(tensor, (first + second) / 2, rtol=1e-6, atol=1e-7)
        assert isotropic == name.endswith("attention.self.key.bias"), name


def test_merged_model_is_better_than_chance_on_both_domains(domains: Classifiers, merged):
    for task in domains.tasks:
        assert_better_than_chance(merged, task)


def test_every_tensor_has_a_fisher_and_unused_words_have_none(domains: Classifiers):
    words = "bert.embeddings.word_embeddings.weight"
    for specialist, task in zip(domains.specialists, domains.tasks, strict=True):
        fishers = specialist.fishers
        assert {n: f.shape for n, f in fishers.items()} == {
            n: theta.shape for n, theta in specialist.thetas.items()
        }
        for name, fisher in fishers.items():
            assert fisher.dtype == torch.float32
            assert bool((fisher >= 0).all()), name
            assert float(fisher.sum()) > 0, name
        tokenizer = AutoTokenizer.from_pretrained(specialist.folder)
        texts = list(task.train.texts[:EXAMPLES])
        encoded = tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
        used = torch.tensor(sorted({token for tokens in encoded for token in tokens}))
        known = fishers[words].sum(-1).nonzero()[:, 0]
        assert torch.equal(known, used)


def test_second_precompute_does_nothing(domains: Classifiers):
    files = [file for s in domains.specialists for file in s.sidecar.iterdir()]
    before = {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in files}
    said = run("mergekit-fisher", "precompute", domains.recipe)
    assert said.count("nothing to measure") == 2
    assert {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in files} == before


def test_batch_size_and_seed_change_an_exact_fisher_by_rounding_only(domains, workshop):
    specialist = domains.specialists[0]
    out = workshop / "variant"
    run(
        "mergekit-fisher", "precompute", domains.recipe, "--model", specialist.folder,
        "--out", out, "--batch-size", 3, "--random-seed", 7,
    )  # fmt: skip
    assert_same_fishers(read(out), specialist.fishers)


def test_measured_fisher_is_autograds_on_single_examples(domains, workshop):
    specialist, task = domains.specialists[1], domains.tasks[1]
    out = workshop / "few"
    run(
        "mergekit-fisher", "precompute", domains.recipe, "--model", specialist.folder,
        "--out", out, "--examples", 4,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_pretrained(specialist.folder)
    tokenizer = AutoTokenizer.from_pretrained(specialist.folder)
    encoded = [tokenizer(text, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
               for text in task.train.texts[:4]]  # fmt: skip
    examples = [Example(number, dict(tokens)) for number, tokens in enumerate(encoded)]
    assert_same_fishers(read(out), exact_classifier(model, examples))
