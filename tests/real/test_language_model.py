"""SmolLM2-135M, all of it, on romance and on learned prose of the Brown corpus."""

from __future__ import annotations

from math import isfinite

import merge_oracle
import pytest
import torch
from models import read
from real import language
from real.specialists import Writers, run
from transformers import AutoModelForCausalLM

pytestmark = [pytest.mark.real, pytest.mark.slow]

TIED = "model.embed_tokens.weight"
SOME = (
    TIED,
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.14.mlp.down_proj.weight",
    "model.layers.29.input_layernorm.weight",
    "model.norm.weight",
)


@pytest.fixture(scope="module")
def merged(writers, workshop):
    out = workshop / "merged-writers"
    run("mergekit-yaml", writers.recipe, out)
    return out


def test_tied_matrix_has_one_fisher_as_in_the_files(writers: Writers):
    for thetas, fishers in zip(writers.thetas, writers.fishers, strict=True):
        assert "lm_head.weight" not in thetas
        assert {n: f.shape for n, f in fishers.items()} == {n: t.shape for n, t in thetas.items()}
        for name, fisher in fishers.items():
            assert bool((fisher >= 0).all()), name
            assert float(fisher.sum()) > 0, name
        # As an output it is used for every word of the vocabulary, so all of its rows are known.
        assert bool((fishers[TIED].sum(-1) > 0).all())


def test_merge_is_the_fisher_average(writers: Writers, merged):
    thetas, fishers, found = writers.thetas, writers.fishers, read(merged)
    assert found.keys() == thetas[0].keys()
    scales = [merge_oracle.scale(fisher, fisher) for fisher in fishers]
    for name in SOME:
        expected = merge_oracle.merge_tensor(
            [theta[name] for theta in thetas], [f[name] for f in fishers], [1.0, 1.0], scales
        )
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-6, atol=1e-7)


def test_bfloat16_output_is_the_float32_merge_rounded_once(writers: Writers, merged, workshop):
    recipe = workshop / "bfloat16.yml"
    recipe.write_text(writers.recipe.read_text() + "out_dtype: bfloat16\n")
    out = workshop / "merged-bfloat16"
    run("mergekit-yaml", recipe, out)
    rounded = read(out)
    for name, tensor in read(merged).items():
        assert torch.equal(rounded[name], tensor.bfloat16()), name
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_merge_is_tied_and_writes_both_genres_about_as_well_as_the_specialists(writers, merged):
    *specialists, merge = (
        language.load(folder) for folder in [*(s.folder for s in writers.specialists), merged]
    )
    assert merge[0].lm_head.weight is merge[0].model.embed_tokens.weight
    for genre, other in (writers.genres, writers.genres[::-1]):
        own, foreign = (
            language.perplexity(*specialists[writers.genres.index(g)], genre.held_out)
            for g in (genre, other)
        )
        found = language.perplexity(*merge, genre.held_out)
        assert isfinite(found)
        assert own < foreign
        assert own * 0.98 < found < foreign * 1.02
