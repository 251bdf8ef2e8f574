"""Fine-tuning and evaluation of a tiny model; one model's body under another's head."""

import random

import pytest
import torch
from models import make_model, read
from safetensors.torch import save_file
from tokenizers_of_words import give_tokenizer
from transformers import AutoTokenizer

from fisher_mergekit.errors import FisherMergekitError
from fisher_mergekit.study.evaluate import Estimate, Score, accuracy, evaluate, load, score
from fisher_mergekit.study.finetune import batches, finetune, schedule
from fisher_mergekit.study.heads import graft
from fisher_mergekit.study.tasks import Examples, Task

PLACES = [
    f"the {animal} {verb} {where} the {thing} {mood} was {quality}"
    for animal in ("cat", "dog")
    for verb in ("sat", "ran")
    for where in ("on", "under")
    for thing in ("mat", "house")
    for mood in ("and", "not")
    for quality in ("good", "bad")
]


def toy(labels=("dog", "cat")):
    """Which animal is it?"""
    texts = random.Random(0).sample(PLACES, k=len(PLACES))
    examples = Examples(tuple(texts), tuple(int("cat" in text) for text in texts))
    train = Examples(examples.texts[:40], examples.labels[:40])
    rest = Examples(examples.texts[40:], examples.labels[40:])
    return Task("animals", labels, train, Examples((), ()), rest)


@pytest.fixture
def start(tmp_path):
    folder = make_model(tmp_path / "start", num_labels=3)
    # Weights of size 1 everywhere saturate: such a model learns nothing.
    calm = {n: 0.2 * t + ("LayerNorm.weight" in n) for n, t in read(folder).items()}
    save_file(calm, folder / "model.safetensors", metadata={"format": "pt"})
    give_tokenizer(folder)
    return folder


FAST = {"learning_rate": 1e-2, "epochs": 20, "batch_size": 8, "quiet": True}


def train(start, out, **options):
    finetune(start, toy(), out, **{**FAST, **options})
    return out


def test_a_specialist_learns_its_task(start, tmp_path):
    out = train(start, tmp_path / "specialist")
    assert accuracy(out, toy()) == 1.0


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(start, tmp_path):
    first, again, other = (
        read(train(start, tmp_path / name, epochs=1, seed=seed))
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_training_leaves_the_callers_random_numbers_alone(start, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(start, tmp_path / "specialist", epochs=1)
    assert torch.equal(torch.rand(3), expected)


def test_batches_hold_every_example_once():
    lengths = [random.Random(0).randrange(1, 60) for _ in range(1000)]
    cut = list(batches(lengths, 32, random.Random(0)))
    assert sorted(i for batch in cut for i in batch) == list(range(1000))
    assert max(len(batch) for batch in cut) == 32


def test_the_learning_rate_rises_to_its_highest_and_falls_towards_zero():
    rates = [schedule(step, 100) for step in range(100)]
    assert rates[9] == 1.0 == max(rates)
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[-1] < 0.02


def test_an_evaluation_counts_what_the_model_answers(start, tmp_path):
    out = train(start, tmp_path / "specialist", epochs=1)
    task = toy()
    model = load(out, task)
    tokenizer = AutoTokenizer.from_pretrained(out)
    answers = [
        int(model(**tokenizer(text, return_tensors="pt")).logits.argmax())
        for text in task.held_out.texts
    ]
    expected = tuple(a == b for a, b in zip(answers, task.held_out.labels, strict=True))
    assert evaluate(out, task).correct == expected
    assert score(model, tokenizer, task.held_out, batch_size=5).correct == expected


def test_progress_tells_every_example(start, tmp_path):
    out = train(start, tmp_path / "specialist", epochs=1)
    told = []
    evaluate(out, toy(), progress=told.append)
    assert sum(told) == len(toy().held_out)


def test_a_model_with_other_labels_is_refused(start, tmp_path):
    out = train(start, tmp_path / "specialist", epochs=1)
    with pytest.raises(FisherMergekitError, match="answers with the labels dog, cat, but animals"):
        evaluate(out, toy(labels=("cat", "dog")))


def test_a_difference_of_scores_is_paired():
    mine = Score((True, True, True, False))
    theirs = Score((True, True, False, False))
    assert mine.accuracy == Estimate(0.75, pytest.approx((0.75 * 0.25 / 4) ** 0.5))
    # One example of four differs: mean 1/4, variance 3/16.
    assert mine.minus(theirs) == Estimate(0.25, pytest.approx((3 / 16 / 4) ** 0.5))
    assert mine.minus(mine) == Estimate(0.0, 0.0)


def test_a_graft_is_one_models_body_under_anothers_head(tmp_path):
    body = make_model(tmp_path / "body", seed=1, num_labels=2)
    head = make_model(tmp_path / "head", seed=2, num_labels=3)
    (head / "sidecar").mkdir()
    graft(body, head, tmp_path / "both")
    whole, mine, theirs = read(tmp_path / "both"), read(body), read(head)
    assert whole.keys() == theirs.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, (theirs if "classifier" in name else mine)[name])
    assert not (tmp_path / "both" / "sidecar").exists()
    assert (tmp_path / "both" / "config.json").read_text() == (head / "config.json").read_text()
