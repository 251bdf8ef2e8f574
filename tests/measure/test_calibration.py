"""Rows of every supported file and data set, and how they become tokens."""

from __future__ import annotations

import csv
import logging
from dataclasses import replace

import datasets
import pytest
import tiny
from tiny import CHAT_TEMPLATE, ROWS, write_rows
from transformers import AutoConfig, AutoTokenizer

from fisher_mergekit.errors import CalibrationError
from fisher_mergekit.measure import encoding
from fisher_mergekit.measure.calibration import DEFAULT_EXAMPLES, Row, load_rows
from fisher_mergekit.measure.encoding import fingerprint, longest_input
from fisher_mergekit.measure.likelihoods import likelihood_for
from fisher_mergekit.recipe import Calibration


def load(path, **keys):
    return load_rows(Calibration(path=str(path), **{"text": "text", **keys}))


TEXTS = [row["text"] for row in ROWS]


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    """Keep the data sets' cache out of the user's, and cold."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = str(tmp_path_factory.mktemp("datasets"))
    yield
    datasets.config.HF_DATASETS_CACHE = before


def write_csv(path, delimiter=","):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    return path


class TestSources:
    @pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".CSV"])
    def test_a_local_file_just_works(self, tmp_path, suffix):
        path = tmp_path / f"data{suffix}"
        if "json" in suffix:
            write_rows(path)
        elif suffix == ".parquet":
            datasets.Dataset.from_list(ROWS).to_parquet(path)
        else:
            write_csv(path, "\t" if suffix == ".tsv" else ",")
        rows = load(path, text=("text", "pair"), label="label")
        assert rows == [Row((r["text"], r["pair"]), None, r["label"]) for r in ROWS]

    def test_a_text_file_has_a_paragraph_an_example(self, tmp_path):
        text = "\ufeffone\nand a half\n\ntwo\n\n\nthree\n\n\n"  # with a mark of UTF-8
        (tmp_path / "data.txt").write_text(text, encoding="utf-8")
        texts = [row.text.strip() for row in load(tmp_path / "data.txt")]
        assert texts == ["one\nand a half", "two", "three"]

    def test_a_folder_of_files_is_a_data_set(self, tmp_path):
        (tmp_path / "set").mkdir()
        write_rows(tmp_path / "set" / "train.jsonl", ROWS[:3])
        write_rows(tmp_path / "set" / "test.jsonl", ROWS[3:])
        assert [row.text for row in load(tmp_path / "set")] == TEXTS[:3]
        assert [row.text for row in load(tmp_path / "set", split="test")] == TEXTS[3:]
        assert len(load(tmp_path / "set", split="train+test")) == len(ROWS)
        assert len(load(tmp_path / "set", split="test[:2]")) == 2

    def test_data_files_choose_among_a_folder_s_files(self, tmp_path):
        write_rows(tmp_path / "one.jsonl", ROWS[:2])
        write_rows(tmp_path / "two.jsonl", ROWS[2:])
        rows = load(tmp_path, data_files="two.jsonl")
        assert [row.text for row in rows] == TEXTS[2:]
        rows = load(tmp_path, data_files={"dev": ["two.jsonl", "one.jsonl"]}, split="dev")
        assert len(rows) == len(ROWS)

    def test_a_builder_with_data_files_works_as_in_datasets(self, tmp_path):
        path = write_rows(tmp_path / "odd.suffix")
        assert [row.text for row in load("json", data_files=str(path))] == TEXTS

    def test_streaming_gives_the_same_rows(self, tmp_path):
        path = write_rows(tmp_path / "data.jsonl")
        assert load(path, streaming=True, examples=3) == load(path, examples=3)

    def test_saved_splits_are_a_data_set(self, tmp_path):
        whole = datasets.Dataset.from_list(ROWS)
        datasets.DatasetDict({"train": whole.select([0]), "test": whole}).save_to_disk(
            tmp_path / "saved"
        )
        assert len(load(tmp_path / "saved", split="test")) == len(ROWS)
        with pytest.raises(CalibrationError, match=r"split 'dev': .*\['train', 'test'\]"):
            load(tmp_path / "saved", split="dev")

    def test_one_saved_split_is_read_too(self, tmp_path):
        """Which load_dataset itself refuses."""
        datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved", num_shards=2)
        assert [row.text for row in load(tmp_path / "saved")] == TEXTS
        with pytest.raises(CalibrationError, match=r"cannot load calibration data .*'dev'"):
            load(tmp_path / "saved", split="dev")


class TestWhichRows:
    @pytest.fixture
    def path(self, tmp_path):
        return write_rows(tmp_path / "data.jsonl", [{"text": f"row {i}"} for i in range(20)])

    def test_the_first_n_in_their_order(self, path):
        assert [row.text for row in load(path, examples=5)] == [f"row {i}" for i in range(5)]

    def test_shuffle_draws_n_of_all_by_the_seed(self, path):
        first, again, other = (
            [row.text for row in load(path, examples=5, shuffle=True, seed=seed)]
            for seed in (1, 1, 2)
        )
        assert first == again != other
        assert len(set(first)) == 5
        assert first != [f"row {i}" for i in range(5)]

    def test_shuffled_streams_hang_on_the_seed_too(self, path):
        options = {"examples": 5, "shuffle": True, "streaming": True}
        assert load(path, seed=1, **options) == load(path, seed=1, **options)

    def test_fewer_than_asked_is_said(self, path, caplog):
        assert len(load(path, examples=21)) == 20
        assert "has only 20 examples, not the 21 asked for; measuring on all" in caplog.text

    def test_fewer_than_the_default_is_nothing_to_speak_of(self, path, caplog):
        assert DEFAULT_EXAMPLES > 20
        with caplog.at_level(logging.WARNING, logger="fisher_mergekit"):
            assert len(load(path)) == 20
        assert not caplog.records


class TestChats:
    @pytest.mark.parametrize("value", ["no chat", [], [{"content": "x"}], None, 5])
    def test_what_is_no_chat_is_refused(self, tmp_path, value):
        path = write_rows(tmp_path / "data.jsonl", [{"chat": value}])
        with pytest.raises(CalibrationError, match="column 'chat' is no chat"):
            load(path, text=None, messages="chat")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    for family in ("bert", "gpt2"):
        tiny.save_model(folder / family, family, chat=CHAT_TEMPLATE)
    return {
        family: (
            AutoTokenizer.from_pretrained(folder / family),
            AutoConfig.from_pretrained(folder / family),
        )
        for family in ("bert", "gpt2")
    }


def encode(rows, tokenizer, config, calibration, head="ForSequenceClassification"):
    encoder = encoding.Encoder(config, calibration, tokenizer=tokenizer)
    return encoding.encode(rows, encoder, likelihood_for(head))


def encoded(tokenizers, family, row, head="ForCausalLM", **keys):
    tokenizer, config = tokenizers[family]
    (example,) = encode([row], tokenizer, config, Calibration(path="data", **keys), head)
    return example, tokenizer.convert_ids_to_tokens(tiny.ids_of(example))


def prompt_of(example):
    """The first token that is scored: position t predicts token t + 1."""
    positions = example.scored.nonzero().flatten().tolist()
    assert positions == list(range(positions[0], len(example) - 1))
    return positions[0] + 1


class TestEncoding:
    def test_a_pair_is_told_apart_by_token_types_where_a_model_has_them(self, tokenizers):
        row = Row(("the cat", "sat"), None, None)
        example, tokens = encoded(tokenizers, "bert", row)
        assert tokens == ["[CLS]", "the", "cat", "[SEP]", "sat", "[SEP]"]
        assert example.inputs["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1]]

    def test_gpt2_gets_no_token_types(self, tokenizers):
        """It would look them up among the words."""
        example, _ = encoded(tokenizers, "gpt2", Row(("the cat", "sat"), None, None))
        assert example.inputs.keys() == {"input_ids"}

    def test_long_texts_are_cut_to_the_shortest_limit(self, tokenizers, caplog):
        row = Row(" ".join(["cat"] * 40), None, None)
        assert len(encoded(tokenizers, "gpt2", row, max_length=5)[0]) == 5
        assert len(encoded(tokenizers, "gpt2", row)[0]) == 12  # the tokenizer's own
        assert not caplog.messages
        assert len(encoded(tokenizers, "gpt2", row, max_length=13)[0]) == 12
        (message,) = caplog.messages  # who asks for more is told
        assert message.startswith("max_length: 13 tokens are more than this model or its tokenizer")

    def test_roberta_loses_the_positions_that_it_counts_from(self, tokenizers):
        tokenizer, _ = tokenizers["bert"]
        roberta = tiny.transformers.RobertaConfig(max_position_embeddings=10, pad_token_id=1)
        assert longest_input(tokenizer, roberta) == 8

    def test_nothing_is_prompt_unless_asked(self, tokenizers):
        assert prompt_of(encoded(tokenizers, "gpt2", Row(("the cat", "sat"), None, None))[0]) == 1

    def test_the_first_of_a_pair_is_the_prompt(self, tokenizers):
        row = Row(("the cat", "sat not"), None, None)
        assert prompt_of(encoded(tokenizers, "gpt2", row, mask_prompt=True)[0]) == 2
        example, tokens = encoded(tokenizers, "bert", row, mask_prompt=True)
        assert tokens[: prompt_of(example)] == ["[CLS]", "the", "cat", "[SEP]"]

    def test_the_longer_part_is_cut_so_that_a_long_prompt_leaves_something_to_score(
        self, tokenizers
    ):
        tokenizer, config = tokenizers["gpt2"]
        row = Row((" ".join(["cat"] * 40), "sat"), None, None)
        calibration = Calibration(path="data", mask_prompt=True, max_length=5)
        (example,) = encode([row], tokenizer, config, calibration, "ForCausalLM")
        assert prompt_of(example) == 4
        assert len(example) == 5

    def test_the_last_message_of_a_chat_is_scored_without_its_header(self, tokenizers):
        chat = [
            {"role": "user", "content": "the cat"},
            {"role": "model", "content": "sat"},
            {"role": "user", "content": "no"},
            {"role": "model", "content": "ran very"},
        ]
        example, tokens = encoded(tokenizers, "gpt2", Row(None, chat, None), mask_prompt=True)
        assert tokens[prompt_of(example) :] == ["ran", "very"]
        assert tokens[prompt_of(example) - 1] == "model"
        assert prompt_of(encoded(tokenizers, "gpt2", Row(None, chat, None))[0]) == 1

    def test_a_template_that_rewrites_earlier_turns_only_hinders_masking(self, tokenizers):
        tokenizer, config = tokenizers["gpt2"]
        chat = [{"role": "user", "content": "the cat"}, {"role": "model", "content": "sat"}]
        before, tokenizer.chat_template = tokenizer.chat_template, (
            "{{ messages | length }} {% for m in messages %}{{ m['content'] }} {% endfor %}"
        )  # fmt: skip
        try:
            row = Row(None, chat, None)
            assert prompt_of(encoded(tokenizers, "gpt2", row)[0]) == 1
            with pytest.raises(CalibrationError, match="so it cannot be masked"):
                encode([row], tokenizer, config, Calibration(path="data", mask_prompt=True))
        finally:
            tokenizer.chat_template = before

    def test_a_chat_that_the_template_refuses_is_one_sentence(self, tokenizers):
        tokenizer, config = tokenizers["gpt2"]
        before = tokenizer.chat_template
        tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        try:
            row = Row(None, [{"role": "user", "content": "no"}], None)
            with pytest.raises(CalibrationError, match=r"example 0: .*roles must alternate"):
                encode([row], tokenizer, config, Calibration(path="data"))
        finally:
            tokenizer.chat_template = before

    def test_labels_are_indices_or_names(self, tokenizers):
        tokenizer, config = tokenizers["bert"]
        config = type(config)(id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
        rows = [Row("cat", None, label) for label in (1, "no", "yes", None)]
        examples = encode(rows, tokenizer, config, Calibration(path="data"))
        assert [None if e.outcome is None else int(e.outcome) for e in examples] == [1, 0, 1, None]

    @pytest.mark.parametrize("label", [-1, 2, "maybe", 0.5, True])
    def test_labels_outside_the_classes_are_refused_with_the_classes(self, tokenizers, label):
        tokenizer, _ = tokenizers["bert"]
        config = tiny.transformers.BertConfig(
            id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1}
        )
        with pytest.raises(CalibrationError, match=r"none of the model's 2 classes .*no, yes"):
            encode([Row("cat", None, label)], tokenizer, config, Calibration(path="data"))

    def test_a_truth_is_told_to_be_a_number(self, tokenizers):
        tokenizer, _ = tokenizers["bert"]
        config = tiny.transformers.BertConfig(num_labels=2)
        with pytest.raises(CalibrationError, match="Write 1 for true and 0 for false; only"):
            encode([Row("cat", None, True)], tokenizer, config, Calibration(path="data"))

    def test_a_text_without_tokens_is_refused(self, tokenizers):
        with pytest.raises(CalibrationError, match="example 0: the text has no tokens"):
            encoded(tokenizers, "gpt2", Row("   ", None, None))

    def test_the_fingerprint_sees_tokens_prompts_labels_and_order(self):
        examples = tiny.ragged_texts(4, prompt=True)
        prints = {
            fingerprint(e)
            for e in (
                examples,
                examples[::-1],
                examples[:3],
                [*examples[:3], replace(examples[3], outcome=examples[3].outcome + 1)],
                [*examples[:3], replace(examples[3], outcome=None)],
                [*examples[:3], replace(examples[3], scored=~examples[3].scored)],
            )
        }
        assert len(prints) == 6
        assert fingerprint(tiny.ragged_texts(4, prompt=True)) in prints
