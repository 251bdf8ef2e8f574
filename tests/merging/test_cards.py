"""The merged model's README.md says what the models were weighted by."""

import mergekit.card
import mergekit.merge
import pytest
import yaml
from factors import make_described
from huggingface_hub import ModelCard
from models import make_measured, make_model, random_fishers, read, write_fishers
from running import command, merged, mergekit_yaml, recipe_of

from fisher_mergekit import __version__
from fisher_mergekit.merging import card
from fisher_mergekit.sidecar.header import HEADER_NAME, Header

COLUMNS = ["model", "lambda", "kind", "estimator", "unit", "examples", "tokens", "data", "revision"]
NOTHING = "–"


def retell(folder, *, calibration=None, revision=None, **settings):
    """Change what a sidecar says of its origin."""
    path = folder / "sidecar" / HEADER_NAME
    header = Header.from_json(path.read_bytes(), path)
    kinds = {
        kind: m.model_copy(
            update={
                "calibration": calibration or m.calibration,
                "settings": m.settings.model_copy(update=settings),
            }
        )
        for kind, m in header.kinds.items()
    }
    model = header.model.model_copy(update={"revision": revision})
    path.write_text(header.model_copy(update={"model": model, "kinds": kinds}).to_json())


def table(text):
    """Return the cells of the section's table, without its second line."""
    _, found, section = text.partition("\n### Measured precisions\n")
    assert found
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    cells = [[c.strip() for c in line.strip("|").split(" | ")] for line in lines]
    assert set(cells.pop(1)) == {"---"}
    return cells


def remarks(text):
    return [line[2:] for line in text.partition("precisions\n")[2].splitlines() if line[:2] == "* "]


def merged_card(recipe, out, **options):
    merged(recipe, out, write_model_card=True, **options)
    return (out / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """Two classifiers of different heads, in `models/`, named from here."""
    monkeypatch.chdir(tmp_path)
    for name, seed, labels in (("rte", 1, 2), ("mnli", 2, 3)):
        make_measured(tmp_path / "models" / name, seed=seed, num_labels=labels)
    return "./models/rte", "./models/mnli"


def pair_recipe(pair, **more):
    parameters = {"exclude": ["classifier"], **more.pop("parameters", {})}
    return recipe_of(*pair, base_model=pair[0], parameters=parameters, **more)


@pytest.mark.slow
def test_by_the_command(pair, tmp_path):
    retell(
        tmp_path / pair[0],
        calibration={
            "path": "glue", "name": "rte", "split": "train", "text": ["premise", "hypothesis"],
            "label": "label", "fingerprint": "8a8e5e25571f3ce926d4f3b0e29ea310",
        },
        revision="5c1f1e2",
        examples=2490,
        tokens=160131,
    )  # fmt: skip
    recipe = pair_recipe(pair, lambdas=[0.7, [{"filter": "embed", "value": 0.2}, {"value": 0.3}]])
    recipe["models"][0]["calibration"] = {"path": "glue", "name": "rte"}
    process, out = mergekit_yaml(recipe, tmp_path / "run")
    assert process.returncode == 0, process.stderr
    text = (out / "README.md").read_text(encoding="utf-8")
    assert "using the [Fisher-weighted averaging](https://arxiv.org/abs/2111.09832)" in text
    assert table(text) == [
        COLUMNS,
        [
            "`./models/rte`", "0.7", "`fisher`", "exact", "sequence", "2,490", "160,131",
            "`glue`, `rte`, split `train`, fingerprint `8a8e5e25571f3ce926d4f3b0e29ea310`",
            "`5c1f1e2`",
        ],
        [
            "`./models/mnli`", "0.2 to 0.3", "`fisher`", "exact", "sequence", "8", "64",
            "`made-up`", NOTHING,
        ],
    ]  # fmt: skip
    body = [n for n in read(tmp_path / pair[0]) if "classifier" not in n]
    assert remarks(text) == [
        f"Merged tensors: {len(body)} by `fisher`.",
        "Not merged, but taken from `./models/rte`: `classifier.bias`, `classifier.weight`.",
        "Parameters: `normalize_fishers` true, `floor` 1e-06, `favor_base` false, `prior` false, "
        "`allow_mixed` false.",
    ]
    assert f"`fisher_mergekit` {__version__}." in text
    # The recipe stands there as it was written, what mergekit does not know of it included.
    written = text.partition("```yaml\n")[2].rpartition("```")[0]
    assert yaml.safe_load(written) == recipe
    assert text.index("### Models Merged") < text.index(card.TITLE) < text.index(card.BEFORE)
    assert ModelCard(text).data.to_dict()["tags"] == ["mergekit", "merge"]


def test_two_kinds_are_two_rows(tmp_path):
    models = []
    for name, seed in (("a", 1), ("b", 2)):
        made = make_described(tmp_path / name, "llama", "kfac", seed=seed)
        write_fishers(made.folder, random_fishers(made.folder, seed), examples=16)
        models.append(made)
    recipe = recipe_of(
        *(m.folder for m in models),
        method="mats",
        parameters={"others": [{"filter": "norm", "value": "fisher"}, {"value": "mean"}]},
    )
    text = merged_card(recipe, tmp_path / "out")
    assert "[MaTS (Kronecker-factored Fisher)](https://arxiv.org/abs/2312.04339)" in text
    assert [row[:1] + row[2:3] + row[5:6] for row in table(text)[1:]] == [
        [f"`{m.folder}`", f"`{kind}`", count]
        for m in models
        for kind, count in (("kfac", "8"), ("fisher", "16"))
    ]
    matrices = [n for n in models[0].factors if not models[0].is_embedding(n)]
    norms = [n for n in models[0].thetas if "norm" in n]
    rest = set(models[0].thetas) - {*matrices, *norms}
    assert remarks(text)[0] == (
        f"Merged tensors: {len(matrices)} by `kfac`, {len(norms)} by `fisher`, "
        f"{len(rest)} as the lambda-weighted mean."
    )
    assert "`others` " + '"mean", "fisher"' in remarks(text)[-1]


def test_a_gram_has_no_estimator_and_who_has_lambda_0_no_provenance(tmp_path):
    made = [make_described(tmp_path / name, "llama", seed=s) for s, name in enumerate("abc")]
    a, b, c = (m.folder for m in made)
    for folder in (a, b, c):
        retell(folder, estimator="none", unit="none", likelihood="none")
    recipe = recipe_of(a, b, c, method="regmean", lambdas=[1, 2, 0])
    text = merged_card(recipe, tmp_path / "out")
    assert table(text)[1:] == [
        [f"`{a}`", "1", "`gram`", NOTHING, NOTHING, "8", "64", "`made-up`", NOTHING],
        [f"`{b}`", "2", "`gram`", NOTHING, NOTHING, "8", "64", "`made-up`", NOTHING],
        [f"`{c}`", "0", *[NOTHING] * 7],
    ]
    text = merged_card(recipe_of(a, b, method="regmean", lambdas=[1, 0]), tmp_path / "copy")
    assert "Each tensor is a copy of one model's." in text
    assert remarks(text)[0] == "Merged tensors: none."
    assert remarks(text)[1] == f"Copied tensors, merged with no other: 21 of `{a}`."


def test_a_prior_is_named(tmp_path):
    a, b, base = (make_measured(tmp_path / n, "llama", seed=s)[0] for s, n in enumerate("abc"))
    retell(base, examples=99)
    recipe = recipe_of(a, b, base_model=str(base), parameters={"prior": True})
    text = merged_card(recipe, tmp_path / "out")
    assert table(text)[-1][:6] == [
        f"`{base}`, the prior", NOTHING, "`fisher`", "exact", "sequence", "99",
    ]  # fmt: skip
    assert remarks(text)[0] == f"Merged tensors: {len(read(base))} by `fisher` and the prior."
    assert f"`{base}`, which the models were trained from, is a [prior](" in text


def test_an_optimizers_state_is_named(tmp_path):
    made = [make_measured(tmp_path / n, "llama", seed=s)[0] for s, n in enumerate("ab")]
    for folder in made:
        retell(
            folder,
            calibration={"optimizer": "run/optimizer.pt", "steps": 500},
            estimator="adam", unit="batch", examples=None, tokens=None, max_length=None,
        )  # fmt: skip
    text = merged_card(recipe_of(*made), tmp_path / "out")
    assert table(text)[1][3:] == [
        "adam", "batch", NOTHING, NOTHING, "`run/optimizer.pt`, steps `500`", NOTHING,
    ]  # fmt: skip


def test_what_a_header_says_stays_in_its_cell(tmp_path):
    made = [make_measured(tmp_path / n, "llama", seed=s)[0] for s, n in enumerate("ab")]
    retell(made[0], calibration={"path": "a|b`\n# Injected\n"})
    text = merged_card(recipe_of(*made), tmp_path / "out")
    assert "| `a\\|b' # Injected` |" in text
    assert "\n# Injected" not in text


def test_slices_are_counted_once_a_tensor(tmp_path):
    a, b = (make_measured(tmp_path / n, "llama", seed=s)[0] for s, n in enumerate("ab"))
    both = [{"model": str(m), "layer_range": [1, 2]} for m in (a, b)]
    recipe = recipe_of(a, b, base_model=str(a))
    del recipe["models"]
    recipe["slices"] = [{"sources": both}, {"sources": both[:1]}]
    text = merged_card(recipe, tmp_path / "out")
    assert [row[0] for row in table(text)[1:]] == [f"`{a}`", f"`{b}`"]
    copied = 11  # a layer's, and what comes behind the last
    both = len(read(tmp_path / "out")) - copied
    assert remarks(text)[:2] == [
        f"Merged tensors: {both} by `fisher`.",
        f"Copied tensors, merged with no other: {copied} of `{a}`.",
    ]


@pytest.mark.slow
def test_every_stage_of_mergekit_multi_has_its_own(tmp_path):
    a, b = (make_measured(tmp_path / n, "llama", seed=s)[0] for s, n in enumerate("ab"))
    stages = [
        {"name": "by-fisher", **recipe_of(a, b, lambdas=[0.2, 0.8])},
        {"name": "plain", **recipe_of(a, b, method="linear", parameters={"weight": 1})},
        {**recipe_of("by-fisher", "plain", method="linear", parameters={"weight": 1})},
    ]
    path = tmp_path / "stages.yml"
    path.write_text("\n---\n".join(map(yaml.safe_dump, stages)))
    done = command(
        "mergekit-multi", path, "--out-path", tmp_path / "out", "-I", tmp_path / "steps", "--quiet"
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "steps" / "by-fisher" / "README.md").read_text()
    assert [row[:2] for row in table(text)[1:]] == [[f"`{a}`", "0.2"], [f"`{b}`", "0.8"]]
    for other in (tmp_path / "steps" / "plain", tmp_path / "out"):
        assert card.TITLE not in (other / "README.md").read_text()


def test_other_methods_have_mergekits_own_card(tmp_path):
    a, b = (make_measured(tmp_path / n, "llama", seed=s)[0] for s, n in enumerate("ab"))
    merged_card(recipe_of(a, b), tmp_path / "ours")  # from now on mergekit's function is wrapped
    assert mergekit.merge.generate_card is not mergekit.card.generate_card
    recipe = recipe_of(a, b, method="linear", parameters={"weight": 1})
    seen = []
    original = mergekit.merge.generate_card

    def generate_card(**arguments):
        seen.append(arguments)
        return original(**arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mergekit.merge, "generate_card", generate_card)
        text = merged_card(recipe, tmp_path / "out")
    assert text == mergekit.card.generate_card(**seen[0])


def test_a_folder_that_looks_like_a_hub_model_needs_no_hub(tmp_path, monkeypatch):
    """mergekit asks the Hub about every folder `a/b`, after everything has been merged."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("rte", 1), ("mnli", 2)):
        make_measured(tmp_path / "models" / name, "llama", seed=seed)
    asked = []

    def repo_exists(name, **_):
        asked.append(name)
        raise ConnectionError("there is no network")

    monkeypatch.setattr("huggingface_hub.repo_exists", repo_exists)
    text = merged_card(recipe_of("models/rte", "models/mnli"), tmp_path / "out")
    assert set(asked) == {"models/rte", "models/mnli"}
    assert "* models/mnli\n" in text
    assert ModelCard(text).data.base_model == []
    assert len(table(text)) == 3
    # mergekit's own behaviour is there again.
    with pytest.raises(ConnectionError):
        mergekit.card.is_hf("models/rte")


@pytest.mark.parametrize("broken", ["mergekit's", "ours"])
def test_a_merge_does_not_fail_for_its_card(tmp_path, monkeypatch, caplog, broken):
    make_model(tmp_path / "c", "llama")
    a, b = (make_measured(tmp_path / n, "llama", seed=s)[0] for s, n in enumerate("ab"))

    def fail(*_args, **_kwargs):
        raise KeyError("something unheard of")

    where = "mergekit.card.method_md" if broken == "mergekit's" else card.__name__ + "._provenance"
    monkeypatch.setattr(where, fail)
    text = merged_card(recipe_of(a, b), tmp_path / "out")
    assert read(tmp_path / "out").keys() == read(a).keys()
    assert "merge_method: fisher\n" in text
    assert "https://arxiv.org/abs/2111.09832" in text
    if broken == "ours":
        assert card.TITLE not in text
        assert "will not say what was measured" in caplog.text
    else:
        assert len(table(text)) == 3
        assert "something unheard of" in caplog.text
