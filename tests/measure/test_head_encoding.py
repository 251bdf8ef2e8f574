"""What each head makes of a row: inputs, what is scored, and what was observed."""

from __future__ import annotations

import io

import pytest
import tiny
import torch
import transformers
from models import FAMILIES
from PIL import Image
from transformers import AutoTokenizer

from fisher_mergekit.errors import CalibrationError, CheckpointError
from fisher_mergekit.measure.calibration import Row, load_rows
from fisher_mergekit.measure.encoding import Encoder, encode, reads
from fisher_mergekit.measure.images import read_image_processor
from fisher_mergekit.measure.likelihoods import likelihood_for
from fisher_mergekit.measure.likelihoods.seq2seq_lm import decoder_inputs
from fisher_mergekit.recipe import Calibration

NAMES = {"id2label": {0: "no", 1: "yes", 2: "maybe"}, "label2id": {"no": 0, "yes": 1, "maybe": 2}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(tiny.save_tokenizer(tmp_path_factory.mktemp("t")))


def bert(**config):
    return transformers.BertConfig(**{**FAMILIES["bert"][1], **config})


def read(head, tokenizer, row, config=None, **keys):
    """Return the one example that a head makes of a row."""
    config = config or bert()
    encoder = Encoder(config, Calibration(path="data", **keys), tokenizer=tokenizer)
    (example,) = encode([row], encoder, likelihood_for(head, config))
    return example


def tokens(example, tokenizer):
    return tokenizer.convert_ids_to_tokens(tiny.ids_of(example))


class TestTokenClassification:
    HEAD = "BertForTokenClassification"

    def test_the_first_token_of_a_word_is_scored(self, tokenizer):
        """The tokenizer parts `good.` into two; the second has no label of its own."""
        row = Row(["good.", "cat", "!?"], None, [1, "maybe", 0])
        example = read(self.HEAD, tokenizer, row, bert(**NAMES))
        assert tokens(example, tokenizer) == ["[CLS]", "good", "[UNK]", "cat", "[UNK]", "[SEP]"]
        assert example.scored.tolist() == [False, True, False, True, True, False]
        assert example.outcome[example.scored].tolist() == [1, 2, 0]

    def test_a_plain_text_has_the_words_of_its_tokenizer(self, tokenizer):
        example = read(self.HEAD, tokenizer, Row("the cat", None, None))
        assert example.scored.tolist() == [False, True, True, False]
        assert example.outcome is None

    def test_what_data_sets_ignore_is_ignored(self, tokenizer):
        row = Row(["good", "cat"], None, [-100, 1])
        example = read(self.HEAD, tokenizer, row, bert(**NAMES))
        assert example.scored.tolist() == [False, False, True, False]

    def test_words_that_were_cut_off_need_no_place(self, tokenizer):
        row = Row(["cat"] * 40, None, [1] * 40)
        example = read(self.HEAD, tokenizer, row, bert(**NAMES))
        assert int(example.scored.sum()) == 10

    @pytest.mark.parametrize(
        ("text", "label", "phrase"),
        [
            (["cat", "dog"], [1], "2 words, but 1 labels"),
            (["cat", "dog"], "no", "is no list of labels"),
            (["cat"], [7], "label 7 is none of the model's 3 classes"),
            ("cat dog", [1, 1], "labels of words need words"),
            (("cat", "dog"), [1, 1], "reads one column"),
        ],
    )
    def test_labels_that_fit_no_words(self, tokenizer, text, label, phrase):
        with pytest.raises(CalibrationError, match=rf"data, example 0: .*{phrase}"):
            read(self.HEAD, tokenizer, Row(text, None, label), bert(**NAMES))


class TestQuestionAnswering:
    HEAD = "BertForQuestionAnswering"

    @pytest.mark.parametrize(
        "label",
        [
            {"text": ["sat very", "sat"], "answer_start": [8, 8]},
            {"text": "sat very", "answer_start": 8},
        ],
    )
    def test_an_answer_is_its_first_and_last_token(self, tokenizer, label):
        example = read(self.HEAD, tokenizer, Row(("is not", "the cat sat very good"), None, label))
        first, last = example.outcome.tolist()
        assert tokens(example, tokenizer)[first : last + 1] == ["sat", "very"]
        assert example.scored is None

    def test_the_question_has_no_answer_s_words_in_it(self, tokenizer):
        label = {"text": ["cat"], "answer_start": [0]}
        example = read(self.HEAD, tokenizer, Row(("cat", "cat"), None, label))
        assert example.outcome.tolist() == [3, 3]

    @pytest.mark.parametrize(
        "label",
        [{"text": [], "answer_start": []}, {"text": ["dog"], "answer_start": [80]}],
        ids=["none", "cut off"],
    )
    def test_no_answer_is_the_first_token(self, tokenizer, label):
        row = Row(("is not", " ".join(["cat"] * 20 + ["dog"])), None, label)
        example = read(self.HEAD, tokenizer, row)
        assert example.outcome.tolist() == [0, 0]
        assert len(example) == 12

    @pytest.mark.parametrize(
        ("label", "phrase"),
        [
            (7, "is no answer; expected a mapping as in SQuAD"),
            ({"text": ["dog"]}, "is no answer"),
            ({"text": ["dog"], "answer_start": []}, "is no answer"),
            ({"text": ["dog"], "answer_start": [1]}, "does not stand at character 1"),
        ],
    )
    def test_labels_that_are_no_answer(self, tokenizer, label, phrase):
        with pytest.raises(CalibrationError, match=phrase):
            read(self.HEAD, tokenizer, Row(("is", "the dog"), None, label))

    def test_a_question_alone_is_refused(self, tokenizer):
        with pytest.raises(CalibrationError, match=r"text: \[QUESTION, CONTEXT\]"):
            read(self.HEAD, tokenizer, Row("the dog", None, None))


class TestMultipleChoice:
    HEAD = "BertForMultipleChoice"

    def test_the_text_stands_beside_every_choice(self, tokenizer):
        row = Row("the cat", None, 1, choices=["sat", "is very good"])
        example = read(self.HEAD, tokenizer, row)
        ids = example.inputs["input_ids"]
        assert ids.shape == (1, 2, 8)
        said = [
            tokenizer.convert_ids_to_tokens(row[mask.bool()].tolist())
            for row, mask in zip(ids[0], example.inputs["attention_mask"][0], strict=True)
        ]
        assert said[0] == ["[CLS]", "the", "cat", "[SEP]", "sat", "[SEP]"]
        assert said[1] == ["[CLS]", "the", "cat", "[SEP]", "is", "very", "good", "[SEP]"]
        assert example.inputs["token_type_ids"].sum() == 2 + 4
        assert int(example.outcome) == 1

    @pytest.mark.parametrize("label", [2, -1, "A", 0.5])
    def test_a_choice_that_is_none(self, tokenizer, label):
        row = Row("the cat", None, label, choices=["sat", "ran"])
        with pytest.raises(CalibrationError, match="is none of the 2 choices; expected 0 to 1"):
            read(self.HEAD, tokenizer, row)

    def test_without_choices(self, tokenizer):
        with pytest.raises(CalibrationError, match="`choices: COLUMN`"):
            read(self.HEAD, tokenizer, Row("the cat", None, 0))

    def test_choices_for_another_head(self, tokenizer):
        with pytest.raises(CalibrationError, match="only multiple-choice models read `choices:`"):
            read("ForSequenceClassification", tokenizer, Row("cat", None, 0, choices=["a", "b"]))

    @pytest.mark.parametrize("choices", ["both", ["first", "second"]])
    def test_choices_are_a_column_of_lists_or_several_columns(self, tmp_path, choices):
        rows = [{"text": "cat", "both": ["sat", "ran"], "first": "sat", "second": "ran"}]
        path = tiny.write_rows(tmp_path / "data.jsonl", rows)
        (row,) = load_rows(Calibration(path=str(path), text="text", choices=choices))
        assert row.choices == ["sat", "ran"]


class TestMaskedLM:
    HEAD = "BertForMaskedLM"

    @pytest.fixture
    def masking(self, tokenizer):
        tokenizer.mask_token = "user"
        yield tokenizer
        tokenizer.mask_token = None

    def test_what_is_masked_is_what_is_scored(self, masking):
        row = Row(" ".join(["cat", "dog", "[UNK]"] * 3), None, None)
        for number in range(20):
            row = Row(row.text, None, None, number=number)
            example = read(self.HEAD, masking, row)
            is_masked = example.inputs["input_ids"][0] == masking.mask_token_id
            assert torch.equal(example.scored, is_masked)
            assert tokens(example, masking)[0] == "[CLS]"
            whole = masking.convert_ids_to_tokens(example.outcome.tolist())
            assert whole == ["[CLS]", *["cat", "dog", "[UNK]"] * 3, "[SEP]"]

    def test_one_token_in_seven_and_never_none(self, masking):
        counts = {
            length: int(
                read(self.HEAD, masking, Row(" ".join(["cat"] * length), None, None)).scored.sum()
            )
            for length in (1, 3, 10)
        }
        assert counts == {1: 1, 3: 1, 10: 2}

    def test_masks_hang_on_the_seed_and_the_example(self, masking):
        def masks(number, seed):
            row = Row(" ".join(["cat"] * 10), None, None, number=number)
            return tuple(read(self.HEAD, masking, row, seed=seed).scored.tolist())

        assert masks(3, 0) == masks(3, 0)
        assert len({masks(number, seed) for number in range(4) for seed in range(4)}) > 8

    def test_every_token_is_masked_as_often_as_any(self, masking):
        """And the outcomes that are drawn later know nothing of it: they use other numbers."""
        count = 600
        total = torch.zeros(12)
        for number in range(count):
            row = Row(" ".join(["cat"] * 10), None, None, number=number)
            total += read(self.HEAD, masking, row).scored
        assert total[[0, 11]].tolist() == [0, 0]
        deviation = (count * 0.2 * 0.8) ** 0.5
        assert (total[1:11] - count * 0.2).abs().max() < 4 * deviation

    def test_a_prompt_is_not_masked(self, masking):
        row = Row(("the cat is", "good"), None, None)
        example = read(self.HEAD, masking, row, mask_prompt=True)
        assert example.scored.nonzero().flatten().tolist() == [5]

    def test_a_tokenizer_without_a_mask(self, tokenizer):
        assert tokenizer.mask_token is None
        with pytest.raises(CalibrationError, match="has no mask token"):
            read(self.HEAD, tokenizer, Row("cat", None, None))


class TestSeq2Seq:
    @pytest.mark.parametrize(
        ("architecture", "options"),
        [
            ("T5ForConditionalGeneration", {}),
            ("BartForConditionalGeneration", {}),
            ("MBartForConditionalGeneration", {}),
        ],
    )
    def test_the_decoder_reads_what_the_model_makes_of_labels(self, architecture, options):
        from heads import HEADS

        sizes = HEADS["translation" if "T5" in architecture else "translation of BART"].sizes
        model = tiny.build(architecture, sizes, **options)
        model.config.architectures = [architecture]
        labels = torch.tensor([[5, 6, 7, 3]])
        expected = model.prepare_decoder_input_ids_from_labels(labels)
        assert torch.equal(decoder_inputs(model.config, labels), expected)

    def test_a_class_that_says_nothing_shifts_by_one(self):
        config = transformers.M2M100Config(decoder_start_token_id=2)
        config.architectures = ["M2M100ForConditionalGeneration"]
        assert decoder_inputs(config, torch.tensor([[5, 6]])).tolist() == [[2, 5]]
        config.decoder_start_token_id = None
        with pytest.raises(CheckpointError, match="decoder_start_token_id"):
            decoder_inputs(config, torch.tensor([[5, 6]]))

    @pytest.mark.parametrize(("name", "key"), [("T5", "decoder_start_token_id"), ("Bart", None)])
    def test_a_model_that_cannot_say_what_targets_begin_with(self, name, key):
        config = getattr(transformers, f"{name}Config")()
        config.architectures = [f"{name}ForConditionalGeneration"]
        if key is not None and hasattr(config, key):
            delattr(config, key)
        labels = torch.tensor([[5, 6]])
        if key is None:
            assert decoder_inputs(config, labels).shape == labels.shape
            return
        with pytest.raises(CheckpointError, match=rf"config.json has no {key}.*; add it"):
            decoder_inputs(config, labels)

    def test_the_target_is_scored_whole(self, tokenizer):
        from heads import HEADS

        head = HEADS["translation"]
        config = transformers.T5Config(**head.sizes)
        config.architectures = [head.architecture]
        example = read(head.architecture, tokenizer, Row(("the cat", "sat"), None, None), config)
        assert tokens(example, tokenizer) == ["[CLS]", "the", "cat", "[SEP]"]
        assert tokenizer.convert_ids_to_tokens(example.outcome.tolist()) == [
            "[CLS]",
            "sat",
            "[SEP]",
        ]
        assert example.inputs["decoder_input_ids"][0].tolist() == [
            2,
            *example.outcome[:-1].tolist(),
        ]
        assert example.scored.all()
        assert len(example) == 4 + 3

    def test_a_source_alone_is_refused(self, tokenizer):
        with pytest.raises(CalibrationError, match=r"text: \[SOURCE, TARGET\]"):
            read(
                "T5ForConditionalGeneration",
                tokenizer,
                Row("cat", None, None),
                transformers.T5Config(),
            )


class TestNumbersAndLabels:
    def one(self, tokenizer, label, **config):
        row = Row("cat", None, label)
        return read("BertForSequenceClassification", tokenizer, row, bert(**config)).outcome

    @pytest.mark.parametrize("label", [2.5, "2.5", [2.5]])
    def test_a_number(self, tokenizer, label):
        assert self.one(tokenizer, label, num_labels=1).tolist() == [2.5]

    def test_several_numbers(self, tokenizer):
        config = {"num_labels": 2, "problem_type": "regression"}
        assert self.one(tokenizer, [1, -2.5], **config).tolist() == [1.0, -2.5]
        for wrong in (1.0, [1.0], [1.0, "x"], [1.0, float("nan")], [1.0, None]):
            with pytest.raises(CalibrationError, match="expected 2 numbers"):
                self.one(tokenizer, wrong, **config)

    @pytest.mark.parametrize(
        ("label", "expected"),
        [
            ([0, 1, 1], [0, 1, 1]),
            ([1.0, 0.0, 0.0], [1, 0, 0]),
            ([True, False, True], [1, 0, 1]),
            (["maybe", "no"], [1, 0, 1]),
            ([2], [0, 0, 1]),
            ([0, 2], [1, 0, 1]),
            ("yes", [0, 1, 0]),
            ([], [0, 0, 0]),
        ],
    )
    def test_several_labels(self, tokenizer, label, expected):
        config = {"problem_type": "multi_label_classification", **NAMES}
        assert self.one(tokenizer, label, **config).tolist() == expected

    def test_several_labels_that_are_none(self, tokenizer):
        config = {"problem_type": "multi_label_classification", **NAMES}
        with pytest.raises(CalibrationError, match="label 3 is none of the model's 3 classes"):
            self.one(tokenizer, [3], **config)
        two = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
        with pytest.raises(CalibrationError, match="a list of 2 zeros and ones, or a list of na"):
            self.one(tokenizer, [1], problem_type="multi_label_classification", **two)

    def test_whether_a_sentence_follows(self, tokenizer):
        row = Row(("the cat", "sat"), None, 1)
        assert int(read("BertForNextSentencePrediction", tokenizer, row).outcome) == 1
        for row, phrase in (
            (Row(("the cat", "sat"), None, 2), "neither 0 .* nor 1"),
            (Row("the cat", None, 1), r"text: \[FIRST, SECOND\]"),
        ):
            with pytest.raises(CalibrationError, match=phrase):
                read("BertForNextSentencePrediction", tokenizer, row)

    def test_words_are_for_token_classifiers(self, tokenizer):
        with pytest.raises(CalibrationError, match="which only token classifiers read"):
            read("BertForSequenceClassification", tokenizer, Row(["cat"], None, None))


class TestPictures:
    HEAD = "ViTForImageClassification"

    @pytest.fixture(scope="class")
    def encoder(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("vit")
        transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
        config = transformers.ViTConfig(**FAMILIES["vit"][1], **NAMES)
        config.save_pretrained(folder)
        calibration = Calibration(path="data", image="picture")
        return Encoder(config, calibration, processor=read_image_processor(folder))

    @pytest.fixture(scope="class")
    def picture(self):
        noise = torch.randint(0, 256, (6, 9, 3), generator=torch.Generator().manual_seed(0))
        return Image.fromarray(noise.to(torch.uint8).numpy())

    def test_a_picture_can_be_given_in_every_way_of_data_sets(self, encoder, picture, tmp_path):
        picture.save(tmp_path / "a.png")
        buffer = io.BytesIO()
        picture.save(buffer, "png")
        content = buffer.getvalue()
        path = str(tmp_path / "a.png")
        ways = [picture, path, content, {"bytes": content, "path": None}, {"path": path}]
        rows = [Row(None, None, "yes", image=image) for image in ways]
        examples = encode(rows, encoder, likelihood_for(self.HEAD, encoder.config))
        expected = encoder.processor(images=picture, return_tensors="pt")["pixel_values"]
        assert expected.shape == (1, 3, 8, 8)
        for example in examples:
            assert torch.equal(example.inputs["pixel_values"], expected)
            assert int(example.outcome) == 1
            assert len(example) == 1

    @pytest.mark.parametrize(
        ("image", "phrase"),
        [
            ("nowhere.png", "this picture cannot be read"),
            (b"no picture", "this picture cannot be read"),
            (7, "expected a picture"),
        ],
    )
    def test_what_is_no_picture(self, encoder, image, phrase):
        with pytest.raises(CalibrationError, match=rf"data, example 0: {phrase}"):
            encode([Row(None, None, 0, image=image)], encoder, likelihood_for(self.HEAD))

    def test_a_picture_for_a_model_of_text(self, tokenizer, picture):
        row = Row(None, None, 0, image=picture)
        with pytest.raises(CalibrationError, match="this model reads text"):
            read("BertForSequenceClassification", tokenizer, row, image="picture")

    def test_a_folder_without_an_image_processor(self, tmp_path):
        with pytest.raises(CheckpointError, match="has no image processor"):
            read_image_processor(tmp_path)


def test_what_a_class_reads():
    assert reads("BertForMaskedLM") == "input_ids"
    assert reads("ViTForImageClassification") == "pixel_values"
    assert reads("WhisperForConditionalGeneration") == "input_features"
    assert reads("RemoteForCausalLM") == "input_ids"
