"""`mergekit-fisher precompute` on a model of every head, from a file to its sidecar."""

from __future__ import annotations

import oracles
import pytest
import tiny
import transformers
from heads import HEADS
from oracles import assert_same_fishers
from PIL import Image
from precomputing import fisher_of, refuse, succeed
from transformers import AutoTokenizer

from fisher_mergekit.sidecar.reader import Sidecar

pytestmark = pytest.mark.slow  # exhaustive: not needed at every change


def saved(folder, name):
    """Save a head's tiny model, with a tokenizer that can do everything, or an image processor."""
    head = HEADS[name]
    model = head.model()
    model.save_pretrained(folder)
    if "ViT" in head.architecture:
        transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    else:
        tokenizer = AutoTokenizer.from_pretrained(tiny.save_tokenizer(folder))
        tokenizer.mask_token = "user"
        tokenizer.save_pretrained(folder)
    return folder, head, model


ROWS = {
    "token classes": (
        [
            {"words": ["good.", "cat"], "tags": [1, 2]},
            {"words": ["the", "dog", "ran"], "tags": ["LABEL_0", -100, "LABEL_1"]},
        ],
        {"--text": ["words"], "--label": ["tags"]},
        "token_classification",
    ),
    "question answering": (
        [
            {"q": "is not", "c": "the cat sat", "a": {"text": ["cat sat"], "answer_start": [4]}},
            {"q": "we", "c": "the dog ran very", "a": {"text": ["dog"], "answer_start": [4]}},
        ],
        {"--text": ["q", "c"], "--label": ["a"]},
        "question_answering",
    ),
    "one number": (
        [{"text": "good cat", "score": 1.5}, {"text": "a bad dog ran", "score": -0.5}],
        {"--text": ["text"], "--label": ["score"]},
        "regression",
    ),
    "several labels": (
        [{"text": "good cat", "l": [0, 1, 1]}, {"text": "a bad dog ran", "l": [1, 0, 0]}],
        {"--text": ["text"], "--label": ["l"]},
        "multi_label",
    ),
    "multiple choice": (
        [
            {"text": "the cat", "a": "sat", "b": "is very good", "right": 1},
            {"text": "the dog not", "a": "ran", "b": "is", "right": 0},
        ],
        {"--text": ["text"], "--choices": ["a", "b"], "--label": ["right"]},
        "multiple_choice",
    ),
    "next sentence": (
        [{"a": "the cat", "b": "sat", "next": 0}, {"a": "we", "b": "is very good", "next": 1}],
        {"--text": ["a", "b"], "--label": ["next"]},
        "next_sentence",
    ),
    "masked words": (
        [{"text": "the cat sat"}, {"text": "a bad dog ran very"}],
        {"--text": ["text"]},
        "masked_lm",
    ),
    "translation": (
        [{"a": "the cat", "b": "sat"}, {"a": "we", "b": "is very good"}],
        {"--text": ["a", "b"]},
        "seq2seq_lm",
    ),
    "pictures": (
        [{"picture": "0.png", "label": 0}, {"picture": "1.png", "label": "LABEL_2"}],
        {"--image": ["picture"], "--label": ["label"]},
        "categorical",
    ),
}


@pytest.fixture(params=ROWS)
def case(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        Image.new("RGB", (9, 7), (40 * number, 90, 200)).save(f"{number}.png")
    rows, columns, name = ROWS[request.param]
    folder, head, model = saved(tmp_path / "model", request.param)
    data = tiny.write_rows(tmp_path / "data.jsonl", rows)
    flags = ["--model", folder, "--path", data]
    for flag, values in columns.items():
        flags += [part for value in values for part in (flag, value)]
    return folder, head, model, flags, name, rows


def test_every_head_is_measured_from_a_file(case):
    folder, _, model, flags, name, rows = case
    for estimator in ("sampled", "empirical"):
        succeed(*flags, "--estimator", estimator, "--force")
        settings = Sidecar(folder / "sidecar", "fisher").measurement.settings
        assert (settings.likelihood, settings.estimator) == (name, estimator)
        assert (settings.examples, settings.unit) == (len(rows), "sequence")
        found = fisher_of(folder)
        whole = sum(parameter.numel() for parameter in model.parameters())
        assert sum(value.numel() for value in found.values()) == whole
        assert any(value.any() for value in found.values())


def test_the_token_unit_is_recorded_or_refused(case):
    folder, _, _, flags, name, _ = case
    has_positions = name in ("token_classification", "masked_lm", "seq2seq_lm")
    if has_positions:
        succeed(*flags, "--unit", "token", "--estimator", "sampled")
        assert Sidecar(folder / "sidecar", "fisher").measurement.settings.unit == "token"
    else:
        assert "`unit: token` is for models that predict something at every token" in refuse(
            *flags, "--unit", "token"
        )


def test_the_empirical_fisher_of_words_is_that_of_the_first_tokens(tmp_path):
    """From the file to the sidecar, against tokens and labels that are written down here."""
    folder, _, model = saved(tmp_path / "model", "token classes")
    data = tiny.write_rows(tmp_path / "data.jsonl", ROWS["token classes"][0])
    succeed(
        "--model", folder, "--path", data, "--text", "words", "--label", "tags",
        "--estimator", "empirical",
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["[CLS] good [UNK] cat [SEP]", "[CLS] the dog ran [SEP]"]
    labels = [{1: 1, 3: 2}, {1: 0, 3: 1}]
    examples = [
        tiny.labelled(number, tokenizer.convert_tokens_to_ids(text.split()))
        for number, text in enumerate(texts)
    ]

    def observed(output, example):
        log_p = output.logits[0].log_softmax(-1)
        yield 1.0, sum(log_p[t, y] for t, y in labels[example.number].items())

    assert_same_fishers(fisher_of(folder), oracles.expectation(model, examples, observed))


def test_the_exact_fisher_of_a_regression_asks_for_no_labels(tmp_path):
    folder, head, model = saved(tmp_path / "model", "one number")
    data = tiny.write_rows(tmp_path / "data.jsonl", [{"text": "good cat"}, {"text": "no"}])
    succeed("--model", folder, "--path", data, "--text", "text")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    examples = [
        tiny.labelled(number, tokenizer.convert_tokens_to_ids(text.split()))
        for number, text in enumerate(["[CLS] good cat [SEP]", "[CLS] no [SEP]"])
    ]
    expected = oracles.expectation(model, examples, head.expected)
    assert_same_fishers(fisher_of(folder), expected)


def test_sound_is_refused(tmp_path):
    folder, _, _ = saved(tmp_path / "model", "speech")
    data = tiny.write_rows(tmp_path / "data.jsonl", [{"text": "good cat"}])
    said = refuse("--model", folder, "--path", data, "--text", "text")
    assert "WhisperForConditionalGeneration reads input_features" in said


def test_a_model_of_pictures_wants_their_column(tmp_path):
    folder, _, _ = saved(tmp_path / "model", "pictures")
    data = tiny.write_rows(tmp_path / "data.jsonl", [{"text": "good cat"}])
    said = refuse("--model", folder, "--path", data, "--text", "text")
    assert "reads pictures; name their column, `image:`" in said


@pytest.mark.parametrize("used", [tiny.WORDS[:3], tiny.WORDS], ids=["some words", "all words"])
def test_a_decoder_without_padding_is_read_to_its_last_token(tmp_path, used):
    """It classifies by its last token, which is [SEP] in every text; as its end-of-text token,
    that is often used for padding too, and then not looked at."""
    sizes = tiny.CLASSIFIERS["LlamaForSequenceClassification"]
    model = tiny.build(
        "LlamaForSequenceClassification", sizes, num_labels=3, pad_token_id=None, eos_token_id=3
    )
    model.save_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny.save_tokenizer(tmp_path / "model"))
    tokenizer.add_special_tokens({"eos_token": "[SEP]", "pad_token": "[SEP]"})
    tokenizer.save_pretrained(tmp_path / "model")
    texts = [*used, "a good film", "xyz", "[PAD]"]
    path = tiny.write_rows(tmp_path / "data.jsonl", [{"text": text} for text in texts])
    succeed("--model", tmp_path / "model", "--path", path, "--text", "text")
    examples = [tiny.labelled(i, tokenizer(text)["input_ids"]) for i, text in enumerate(texts)]
    assert {tiny.ids_of(example)[-1] for example in examples} == {3}
    found = fisher_of(tmp_path / "model")
    assert_same_fishers(found, oracles.exact_classifier(model, examples))
