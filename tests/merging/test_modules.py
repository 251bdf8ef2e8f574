"""Slices, and what the output's configuration and modules make of them."""

from __future__ import annotations

import logging
import shutil

import models as families
import pytest
import transformers
from factors import make_described, mean, merged_matrix, scale
from models import make_measured, make_model, rewrite
from running import assert_close, merged, recipe_of
from slicing import by_hand, piece, plan_of, sliced

from fisher_mergekit.errors import PlanningError

pytestmark = pytest.mark.slow  # exhaustive: not needed at every change


class TestConfiguration:
    """What the output's configuration says of single layers follows them."""

    TYPES = ("sliding_attention", "full_attention", "sliding_attention", "full_attention")

    @pytest.fixture
    def pair(self, tmp_path, monkeypatch):
        sizes = families._DECODER | {"layer_types": list(self.TYPES), "num_hidden_layers": 4}
        monkeypatch.setitem(families.FAMILIES, "gemma3", ("Gemma3ForCausalLM", sizes))
        return [make_measured(tmp_path / n, "gemma3", seed=i) for i, n in enumerate("ab")]

    def test_of_the_source_layers(self, pair, tmp_path):
        (a, theta_a, fisher_a), (b, theta_b, fisher_b) = pair
        recipe = sliced(piece((a, 1, 2, 1), (b, 3, 4, 1)), piece((a, 3, 4, 1)), piece((b, 0, 2, 1)))
        found = merged(recipe, tmp_path / "out")
        config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
        full, window = "full_attention", "sliding_attention"
        assert config.layer_types == [full, full, window, full]
        layers = [[(0, 1, 1), (1, 3, 1)], [(0, 3, 1)], [(1, 0, 1)], [(1, 1, 1)]]
        plan = plan_of(theta_a, layers, before=[(0, 1), (1, 1)], after=[(1, 1)])
        assert_close(found, by_hand(plan, [theta_a, theta_b], [fisher_a, fisher_b]))
        _, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", output_loading_info=True
        )
        assert not info["missing_keys"]

    def test_as_many_layers_in_another_order(self, pair, tmp_path):
        folder = pair[0][0]
        pieces = [piece((folder, i, i + 1, 1)) for i in (3, 2, 1, 0)]
        merged(sliced(*pieces), tmp_path / "out")
        config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
        assert config.layer_types == list(reversed(self.TYPES))

    def test_layers_that_differ_in_it(self, pair, tmp_path, caplog):
        a, b = pair[0][0], pair[1][0]
        merged(sliced(piece((a, 1, 2, 1), (b, 0, 1, 1))), tmp_path / "out")
        (record,) = [r for r in caplog.records if "layer_types" in r.getMessage()]
        assert record.levelno == logging.WARNING
        assert f"full_attention is layer 1 of {a}" in record.getMessage()
        config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
        assert config.layer_types == ["full_attention"]

    def test_nothing_changes_where_nothing_is_sliced(self, pair, tmp_path):
        merged(recipe_of(pair[0][0], pair[1][0]), tmp_path / "out")
        config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
        assert config.layer_types == list(self.TYPES)


class TestModules:
    """Recipes for models of several modules, each with layers of its own."""

    @pytest.fixture(autouse=True)
    def _as_mergekit_knows_it(self, monkeypatch):
        sizes = families.FAMILIES["t5"][1] | {"feed_forward_proj": "gated-gelu"}
        sizes |= {"tie_word_embeddings": False, "num_layers": 3, "num_decoder_layers": 2}
        monkeypatch.setitem(families.FAMILIES, "t5", ("T5ForConditionalGeneration", sizes))

    @pytest.fixture
    def pair(self, tmp_path):
        return [make_measured(tmp_path / n, "t5", seed=i) for i, n in enumerate("ab")]

    @staticmethod
    def recipe(**modules):
        return {"merge_method": "fisher", "dtype": "float32", "modules": modules}

    def test_each_in_its_own_way(self, pair, tmp_path):
        """The encoder in crossing slices, the decoder of one model, the words of both."""
        (a, theta_a, fisher_a), (b, theta_b, fisher_b) = pair
        listed = [{"model": str(a)}, {"model": str(b), "parameters": {"lambda": 4}}]
        encoder = [
            piece((a, 0, 1, 0.4), (b, 0, 1, 0.6)),
            piece((a, 1, 2, 0.4), (b, 2, 3, 0.6)),
            piece((b, 1, 3, 1)),
            piece((a, 2, 3, 1)),
        ]
        recipe = self.recipe(
            encoder={"slices": encoder},
            decoder={"models": [{"model": str(a)}]},
            shared={"models": listed, "parameters": {"lambda": 2}},
        )
        found = merged(recipe, tmp_path / "out")
        layers = [
            [(0, 0, 0.4), (1, 0, 0.6)],
            [(0, 1, 0.4), (1, 2, 0.6)],
            [(1, 1, 1)],
            [(1, 2, 1)],
            [(0, 2, 1)],
        ]
        outer = [(0, 2), (1, 4)]  # the module's lambda is that of a model which has none of its own
        plan = plan_of([n for n in theta_a if n.startswith("encoder.")], layers,
                       before=[(0, 0.4), (1, 0.6)], after=[(0, 1)])  # fmt: skip
        for layer in range(1, 5):  # only the first layer has one
            del plan[f"encoder.block.{layer}.layer.0.SelfAttention.relative_attention_bias.weight"]
        plan |= {n: [(0, n, 1)] for n in theta_a if n.startswith("decoder.")}
        plan |= {n: [(m, n, x) for m, x in outer] for n in theta_a if n == "shared.weight"}
        assert_close(found, by_hand(plan, [theta_a, theta_b], [fisher_a, fisher_b]))
        config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
        assert (config.num_layers, config.num_decoder_layers) == (5, 2)
        _, info = transformers.T5ForConditionalGeneration.from_pretrained(
            tmp_path / "out", output_loading_info=True
        )
        assert not info["missing_keys"]

    @pytest.mark.parametrize(("kind", "method"), [("gram", "regmean"), ("kfac", "mats")])
    def test_by_factors(self, tmp_path, kind, method):
        """Each module is what a merge of all with its lambdas has there."""
        models = [tmp_path / n for n in "ab"]
        for seed, folder in enumerate(models):
            make_described(folder, "t5", kind, seed=seed)
        encoder, decoder = (
            merged(recipe_of(*models, method=method, lambdas=lambdas), tmp_path / name)
            for name, lambdas in (("encoder", [1, 1]), ("decoder", [1, 3]))
        )
        listed = [{"model": str(m)} for m in models]
        modules = {"encoder": listed, "shared": listed}
        modules["decoder"] = [listed[0], {**listed[1], "parameters": {"lambda": 3}}]
        recipe = self.recipe(**{name: {"models": given} for name, given in modules.items()})
        found = merged({**recipe, "merge_method": method}, tmp_path / "out")
        of_decoder = {n for n in found if n.startswith("decoder.")}
        assert any((encoder[n] - decoder[n]).abs().max() > 1e-3 for n in of_decoder)
        expected = {n: (decoder if n in of_decoder else encoder)[n] for n in found}
        assert_close(found, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(("kind", "method"), [("gram", "regmean"), ("kfac", "mats")])
    def test_crossing_slices_by_factors(self, tmp_path, kind, method):
        """A layer takes the factors of its source along; what it is alone in, it is copied in."""
        made = [make_described(tmp_path / n, "t5", kind, seed=i) for i, n in enumerate("ab")]
        a, b = (described.folder for described in made)
        both = [{"model": str(folder)} for folder in (a, b)]
        encoder = [piece((a, 0, 1, 2), (b, 0, 1, 3)), piece((a, 1, 2, 2), (b, 2, 3, 3))]
        encoder.append(piece((b, 1, 2, 1)))
        recipe = self.recipe(
            encoder={"slices": encoder},
            decoder={"models": both},
            shared={"models": both},
        )
        content = {**recipe, "merge_method": method}
        content["parameters"] = {"tolerance": 1e-10} if kind == "kfac" else {}
        found = merged(content, tmp_path / "out")

        names = list(made[0].thetas)
        layers = [[(0, 0, 2), (1, 0, 3)], [(0, 1, 2), (1, 2, 3)], [(1, 1, 1)]]
        plan = plan_of([n for n in names if n.startswith("encoder.")], layers,
                       before=[(0, 2), (1, 3)], after=[(1, 1)])  # fmt: skip
        for layer in (1, 2):  # only the first layer has one
            del plan[f"encoder.block.{layer}.layer.0.SelfAttention.relative_attention_bias.weight"]
        plan |= {n: [(0, n, 1), (1, n, 1)] for n in names if not n.startswith("encoder.")}
        by_kind = {n for n in names if n in made[0].factors and not made[0].is_embedding(n)}
        used = [{n for ps in plan.values() if len(ps) > 1 for i, n, _ in ps if i == m} & by_kind
                for m in (0, 1)]  # fmt: skip
        scales = [scale(m, n) for m, n in zip(made, used, strict=True)] if kind == "kfac" else None
        expected = {}
        for name, sources in plan.items():
            parts = [(made[m], n, lam) for m, n, lam in sources]
            is_matrix = len(parts) > 1 and parts[0][1] in by_kind
            expected[name] = (
                merged_matrix(parts, scales)
                if is_matrix
                else mean([m.thetas[n] for m, n, _ in parts], [lam for *_, lam in parts])
            )
        assert_close(found, expected, rtol=1e-4, atol=1e-4)

    def test_a_layer_that_lacks_what_its_partner_has(self, pair, tmp_path):
        """The first layer of a T5 has the positions of all others."""
        (a, *_), (b, *_) = pair
        listed = {"models": [{"model": str(m)} for m in (a, b)]}
        encoder = {"slices": [piece((a, 0, 1, 1), (b, 1, 2, 1)), piece((a, 1, 3, 1))]}
        with pytest.raises(PlanningError) as info:
            merged(self.recipe(encoder=encoder, decoder=listed, shared=listed), tmp_path / "out")
        (problem,) = info.value.problems
        assert f"{b} lacks encoder.block.1.layer.0.SelfAttention.relative_attention" in problem

    def test_a_module_that_there_is_not(self, pair, tmp_path):
        listed = {"models": [{"model": str(m[0])} for m in pair]}
        with pytest.raises(PlanningError) as info:
            merged(self.recipe(encodr=listed, decoder=listed, shared=listed), tmp_path / "out")
        (problem,) = info.value.problems
        assert problem.startswith("`modules:` names 'encodr', but a model of this kind has ")
        assert problem.endswith("Did you mean 'encoder'?")

    @pytest.mark.parametrize("is_sliced", [False, True])
    def test_a_module_is_left_out(self, pair, tmp_path, is_sliced):
        listed = {"models": [{"model": str(m[0])} for m in pair]}
        slices = {"slices": [piece((pair[0][0], 0, 2, 1))]}
        decoder = slices if is_sliced else listed
        with pytest.raises(PlanningError) as info:
            merged(self.recipe(encoder=listed, decoder=decoder), tmp_path / "out")
        (problem,) = info.value.problems
        assert problem.startswith("`modules:` says nothing of shared, so the merged model would ")


class TestInferred:
    """Models that mergekit has no description of: it looks into their files."""

    def test_layers_in_another_order(self, tmp_path):
        (a, theta_a, fisher_a), (b, theta_b, fisher_b) = (
            make_measured(tmp_path / n, "vit", seed=i) for i, n in enumerate("ab")
        )
        recipe = sliced(piece((a, 1, 2, 0.4), (b, 0, 1, 0.6)), piece((b, 1, 2, 1)))
        merged(recipe, tmp_path / "out")
        layers = [[(0, 1, 0.4), (1, 0, 0.6)], [(1, 1, 1)]]
        outer = [(0, 0.4), (1, 0.6)]  # mergekit puts all that is outside the layers before them
        plan = plan_of(theta_a, layers, before=outer, after=outer)
        assert_loaded(tmp_path / "out", by_hand(plan, [theta_a, theta_b], [fisher_a, fisher_b]))

    def test_another_number_of_layers(self, tmp_path):
        """mergekit would write it, with a configuration of two layers."""
        (a, theta_a, _), (b, theta_b, _) = (
            make_measured(tmp_path / n, "vit", seed=i) for i, n in enumerate("ab")
        )
        with pytest.raises(PlanningError) as info:
            merged(sliced(piece((a, 0, 2, 1)), piece((b, 0, 1, 1))), tmp_path / "out")
        assert info.value.problems == (
            "the slices of module default make 3 layers, but the output's configuration says 2, "
            "and mergekit does not know where to change it for this kind of model. Make 2 layers, "
            "or name a `base_model:` that has 3.",
        )
        base = make_model(tmp_path / "base", "vit", num_hidden_layers=3)
        recipe = sliced(piece((a, 0, 2, 1)), piece((b, 0, 1, 1)), base_model=str(base))
        merged(recipe, tmp_path / "out")
        outer = [(0, 1)]
        plan = plan_of(theta_a, [[(0, 0, 1)], [(0, 1, 1)], [(1, 0, 1)]], before=outer, after=outer)
        expected = {n: (theta_a, theta_b)[m][source] for n, [(m, source, _)] in plan.items()}
        assert_loaded(tmp_path / "out", expected)

    def test_a_module_of_a_model_of_pictures_and_text(self, tmp_path):
        """Only the language model's layers change places; memory has other names than files."""
        (a, theta_a, fisher_a), (b, theta_b, fisher_b) = (
            make_measured(tmp_path / n, "llava", seed=i) for i, n in enumerate("ab")
        )
        both = {"models": [{"model": str(m)} for m in (a, b)]}
        words = [piece((a, 1, 2, 0.4), (b, 0, 1, 0.6)), piece((a, 0, 1, 1))]
        recipe = {
            "merge_method": "fisher",
            "dtype": "float32",
            "modules": {
                "default": both,
                "model.vision_tower.encoder.layers": both,
                "model.language_model.layers": {"slices": words},
            },
        }
        merged(recipe, tmp_path / "out")
        layers = [[(0, 1, 0.4), (1, 0, 0.6)], [(0, 0, 1)]]
        mine = [n for n in theta_a if n.startswith("language_model.model.layers")]
        plan = plan_of(mine, layers, before=[], after=[])
        plan |= {n: [(0, n, 1), (1, n, 1)] for n in theta_a if n not in mine}
        assert_loaded(tmp_path / "out", by_hand(plan, [theta_a, theta_b], [fisher_a, fisher_b]))


def assert_loaded(out, expected):
    """Compare what transformers loads of a merge with what it loads of a file of the expected."""
    by_hand = out.with_name("by-hand")
    by_hand.mkdir()
    shutil.copy(out / "config.json", by_hand)
    rewrite(by_hand, {name: tensor.float() for name, tensor in expected.items()})
    assert_close(loaded(out), loaded(by_hand))


def loaded(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    model_class = getattr(transformers, config.architectures[0])
    model, info = model_class.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.state_dict()
