"""How a model computes: attention, checkpoints, and dtypes with few digits or little range."""

from __future__ import annotations

import copy
import subprocess
import sys
from statistics import median

import oracles
import pytest
import tiny
import torch
from oracles import assert_same_fishers, rms
from precomputing import fisher_of, succeed

from fisher_mergekit.errors import MeasureError
from fisher_mergekit.measure import scaling
from fisher_mergekit.measure.batches import collate
from fisher_mergekit.measure.checkpointing import checkpoint_layers
from fisher_mergekit.sidecar.reader import Sidecar

pytestmark = pytest.mark.slow  # exhaustive: not needed at every change


def attending(model, way):
    model = copy.deepcopy(model)
    model.set_attn_implementation(way)
    return model


class TestAttention:
    @pytest.mark.parametrize("architecture", tiny.CLASSIFIERS)
    def test_sdpa_and_eager_give_the_same_classifier(self, architecture):
        model, examples = tiny.classifier(architecture), tiny.ragged(5)
        expected = oracles.exact_classifier(attending(model, "eager"), examples)
        for way in ("eager", "sdpa"):
            found = tiny.measured(attending(model, way), examples, batch_size=3)
            assert_same_fishers(found, expected)

    @pytest.mark.parametrize("name", tiny.CAUSAL_LMS)
    def test_sdpa_and_eager_give_the_same_language_model(self, name):
        model, examples = tiny.causal_lm(name), tiny.ragged_texts(5)
        expected = tiny.measured(attending(model, "eager"), examples, "empirical", batch_size=3)
        found = tiny.measured(attending(model, "sdpa"), examples, "empirical", batch_size=3)
        assert_same_fishers(found, expected)


class TestCheckpointing:
    """Computing activations twice is computing the same activations."""

    @pytest.mark.parametrize("architecture", tiny.CLASSIFIERS)
    def test_a_classifier_is_the_same_bit_by_bit(self, architecture):
        model, examples = tiny.classifier(architecture), tiny.ragged(5)
        expected = tiny.measured(model, examples, batch_size=3)
        checkpoint_layers(model)
        found = tiny.measured(model, examples, batch_size=3)
        assert all(torch.equal(found[name], value) for name, value in expected.items())

    @pytest.mark.parametrize("name", tiny.CAUSAL_LMS)
    def test_a_language_model_is_the_same_bit_by_bit(self, name):
        model, examples = tiny.causal_lm(name), tiny.ragged_texts(5)
        expected = tiny.measured(model, examples, "empirical", batch_size=3)
        checkpoint_layers(model)
        found = tiny.measured(model, examples, "empirical", batch_size=3)
        assert all(torch.equal(found[name], value) for name, value in expected.items())

    def test_layers_run_again_and_nothing_is_dropped(self):
        """transformers' own way would need training mode, in which there is dropout."""
        model, examples = tiny.classifier(), tiny.ragged(4)
        assert model.config.hidden_dropout_prob > 0
        checkpoint_layers(model)
        session = tiny.session_for(model.train())
        session.verify(examples)
        calls = []
        layer = model.bert.encoder.layer[0]

        def note(module, inputs, output):
            if len(output) > 1:  # and not an example alone, to compare with
                calls.append(layer.training)

        layer.intermediate.register_forward_hook(note)
        session._add_batch(session.placed(collate(examples, tiny.PAD)))
        # Once forward, and once for each of the two backward passes of three classes.
        assert calls == [False] * 3

    @pytest.mark.parametrize("model", [torch.nn.Linear(2, 2), torch.nn.Sequential()])
    def test_a_model_without_layers_is_refused(self, model):
        with pytest.raises(MeasureError, match="has no layers that transformers can checkpoint"):
            checkpoint_layers(model)

    @pytest.mark.slow
    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_it_takes_less_memory(self):
        plain, checkpointed = (peak_memory(flag) for flag in (False, True))
        assert checkpointed < 0.6 * plain, f"{checkpointed:.0f} MiB, without {plain:.0f} MiB"


def peak_memory(checkpointing: bool) -> float:
    """Return by how many MiB a process of its own grows while it measures long texts."""
    program = f"""
import re, sys, torch
from pathlib import Path
sys.path[:0] = {sys.path!r}
import tiny
from fisher_mergekit.measure.batches import collate
from fisher_mergekit.measure.checkpointing import checkpoint_layers
torch.set_num_threads(1)
sizes = dict(tiny.CLASSIFIERS["BertForSequenceClassification"],
    hidden_size=32, intermediate_size=64, num_hidden_layers=24, num_attention_heads=4,
    max_position_embeddings=512, num_labels=2)
model = tiny.build("BertForSequenceClassification", sizes)
model.set_attn_implementation("eager")
examples = [tiny.labelled(n, [1 + n % 7] * 256, 0) for n in range(4)]
if {checkpointing}:
    checkpoint_layers(model)
session = tiny.session_for(model)
session.verify = lambda examples: session._taps.seal()
logits = session._taps.forward(session.logits, session.placed(collate(examples[:1], tiny.PAD)))
del logits
session._taps.seal()
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = peak()
session.run(examples, 4)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout) / 1024


class TestFewDigits:
    """Against float32, by the error of a tensor relative to its norm: the median, and the worst."""

    @staticmethod
    def errors(model, examples, dtype, estimator="exact"):
        expected = tiny.measured(model, examples, estimator, batch_size=3)
        found = tiny.measured(copy.deepcopy(model).to(dtype), examples, estimator, batch_size=3)
        assert {value.dtype for value in found.values()} == {torch.float32}
        largest = max(rms(value) for value in expected.values())
        return [
            rms(found[name] - value) / rms(value)
            for name, value in expected.items()
            if rms(value) > 1e-10 * largest  # the bias of attention keys is zero on paper
        ]

    @pytest.mark.parametrize("architecture", tiny.CLASSIFIERS)
    @pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.04), (torch.float16, 0.01)])
    def test_classifiers(self, architecture, dtype, bound):
        errors = self.errors(tiny.classifier(architecture), tiny.ragged(7), dtype)
        assert median(errors) < bound
        assert max(errors) < 5 * bound

    @pytest.mark.parametrize("name", ["tied Qwen2", "untied Llama", "tied GPT-2"])
    @pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
    def test_language_models(self, name, dtype, bound):
        errors = self.errors(tiny.causal_lm(name), tiny.ragged_texts(7), dtype, "empirical")
        assert median(errors) < bound
        assert max(errors) < 5 * bound


class TestFloat16:
    """It has no numbers below 6e-8 and above 65504, and gradients have."""

    @staticmethod
    def sure(confidence=14.0):
        """Return a model that is sure of class 0: its gradients are small."""
        model = tiny.classifier()
        with torch.no_grad():
            model.classifier.bias.copy_(torch.tensor([0.0, -confidence, -confidence - 4]))
        return model

    @pytest.mark.parametrize("confidence", [0.0, 14.0, 40.0])
    def test_small_gradients_are_no_zeros(self, confidence):
        model, examples = self.sure(confidence), tiny.ragged(7)
        expected = tiny.measured(model, examples, batch_size=3)
        found = tiny.measured(copy.deepcopy(model).half(), examples, batch_size=3)
        for name, value in expected.items():
            if not name.endswith("key.bias"):
                assert rms(found[name] - value) < 0.02 * rms(value), name

    def test_without_a_scale_they_would_be(self, monkeypatch):
        model, examples = self.sure(40.0).half(), tiny.ragged(7)
        monkeypatch.setattr(scaling, "LARGEST", 1.0)
        with pytest.raises(MeasureError, match="zero everywhere"):
            tiny.measured(model, examples, batch_size=3, fast=False)

    @pytest.mark.parametrize("excess", [2, 8, 20])
    def test_a_scale_that_is_too_large_falls_and_nothing_counts_twice(self, excess, monkeypatch):
        """Overflow is found in the middle of a backward pass, when some squares have been added."""
        model, examples = tiny.classifier().half(), tiny.ragged(7)
        session = tiny.session_for(model)
        expected = {p: value.clone() for p, value in session.run(examples, 3).items()}
        settled = session._taps.scale

        session = tiny.session_for(model)
        session.verify(examples)
        session._taps.scale *= 2.0**excess
        monkeypatch.setattr(session, "verify", lambda examples: None)
        found = session.run(examples, 3)
        assert settled / 2 <= session._taps.scale <= 2 * settled
        names = {p: name for name, p in model.named_parameters()}
        assert_same_fishers(
            {names[p]: value for p, value in found.items()},
            {names[p]: value for p, value in expected.items()},
            relative=1e-3,
            noise=1e-6,
        )

    def test_parameters_without_a_rule_are_scaled_too(self):
        model, examples = self.sure(), tiny.ragged(7)
        expected = tiny.measured(model, examples, batch_size=3)
        session = tiny.session_for(copy.deepcopy(model).half())
        session._taps.loosen_all("to see whether it works")
        totals = session.run(examples, 3)
        assert len(session.loose) == len(expected)
        for name, parameter in session.model.named_parameters():
            if not name.endswith("key.bias"):
                assert rms(totals[parameter] - expected[name]) < 0.02 * rms(expected[name]), name

    def test_what_no_scale_can_mend_is_said(self):
        model = tiny.classifier().half()
        with torch.no_grad():
            model.bert.encoder.layer[0].output.dense.bias[0] = torch.inf
        with pytest.raises(MeasureError, match="bfloat16"):
            tiny.measured(model, tiny.ragged(4))


def settings_of(model):
    return Sidecar(model / "sidecar", "fisher").measurement.settings


class TestCommand:
    @pytest.fixture
    def bert(self, tmp_path):
        return tiny.save_model(tmp_path / "bert", num_labels=3)

    @pytest.fixture
    def flags(self, bert, tmp_path):
        data = tiny.write_rows(tmp_path / "rows.jsonl")
        return ("--model", bert, "--path", data, "--text", "text", "--force")

    def test_attention_is_recorded_and_changes_rounding_only(self, bert, flags):
        fishers = {}
        for given, way in [((), "sdpa"), (("--attn-implementation", "eager"), "eager")]:
            succeed(*flags, *given)
            fishers[way] = fisher_of(bert)
            assert settings_of(bert).attn_implementation == way
        assert_same_fishers(fishers["eager"], fishers["sdpa"])
        assert "nothing to measure" in succeed(*flags[:-1])

    def test_checkpoints_change_nothing(self, bert, flags):
        succeed(*flags)
        expected = fisher_of(bert)
        succeed(*flags, "--gradient-checkpointing")
        found = fisher_of(bert)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        assert "nothing to measure" in succeed(*flags[:-1])

    @pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.1), ("float16", 0.02)])
    def test_dtype(self, bert, flags, dtype, bound):
        succeed(*flags)
        expected = fisher_of(bert)
        succeed(*flags, "--dtype", dtype)
        found = fisher_of(bert)
        errors = [rms(found[n] - v) / rms(v) for n, v in expected.items() if "key.bias" not in n]
        assert 0 < median(errors) < bound
        assert settings_of(bert).compute_dtype == dtype
