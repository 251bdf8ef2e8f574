"""mergekit's flags of execution change speed, memory and files; not one number of a merge."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
import types

import merge_oracle
import models as families
import pytest
import torch
import transformers
import yaml
from factors import make_described, merged_model
from mergekit import multigpu_executor
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import merge_state_dicts, merge_tensors
from mergekit.options import MergeOptions
from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig, plan_flat_merge
from models import make_measured, read
from running import assert_close, command, merged, planned, recipe_of, run_planned, scheduled

from fisher_mergekit.errors import FisherMergekitError, PlanningError, SidecarError
from fisher_mergekit.merging import tasks
from fisher_mergekit.merging.aligning import ABSENT, FirstRows, TokenRows
from fisher_mergekit.merging.loading import LoadTheta, Together
from fisher_mergekit.precision import diagonal

pytestmark = pytest.mark.slow  # exhaustive: not needed at every change

METHODS = {"fisher": "fisher", "gram": "regmean", "kfac": "mats"}


def assert_same(found, expected):
    """Compare bit by bit."""
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """Return a recipe of each method, and what it gives without any flag."""
    place = tmp_path_factory.mktemp("plain")
    found = {}
    for kind, method in METHODS.items():
        folders = []
        for seed, name in enumerate("ab"):
            folder = place / kind / name
            if kind == "fisher":
                make_measured(folder, "llama", seed=seed)
            else:
                make_described(folder, "llama", kind, seed=seed)
            folders.append(folder)
        parameters = {"exclude": ["lm_head"]}
        recipe = recipe_of(
            *folders, method=method, lambdas=[0.3, 0.7], base_model=str(folders[1]),
            parameters=parameters, dtype="bfloat16",
        )  # fmt: skip
        found[method] = (recipe, merged(recipe, place / method))
    return found


FLAGS = {
    "low_cpu_memory": {"low_cpu_memory": True},
    "read_to_gpu": {"read_to_gpu": True, "device": "cpu"},
    "lazy_unpickle": {"lazy_unpickle": True},
    "async_write": {"async_write": True},
    "write_threads": {"async_write": True, "write_threads": 3},
    "out_shard_size": {"out_shard_size": 300},
    "clone_tensors": {"clone_tensors": True},
    "copy_tokenizer": {"copy_tokenizer": True},
    "random_seed": {"random_seed": 7},
    "allow_crimes": {"allow_crimes": True},
    "trust_remote_code": {"trust_remote_code": True},
    "everything": {
        "low_cpu_memory": True,
        "read_to_gpu": True,
        "async_write": True,
        "write_threads": 2,
        "clone_tensors": True,
        "out_shard_size": 500,
    },
}


@pytest.mark.parametrize("method", METHODS.values())
@pytest.mark.parametrize("flag", FLAGS)
def test_the_same_bits(recipes, tmp_path, method, flag):
    recipe, plain = recipes[method]
    assert_same(merged(recipe, tmp_path / "out", **FLAGS[flag]), plain)
    if "out_shard_size" in FLAGS[flag]:
        assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("method", METHODS.values())
@pytest.mark.parametrize(
    ("flags", "device"),
    [
        ({"device": "cuda"}, None),
        ({"device": "cuda", "low_cpu_memory": True}, None),
        ({"device": "cuda", "read_to_gpu": True}, "cuda"),
    ],
)
def test_what_is_read_to_an_accelerator(recipes, method, flags, device):
    """The models, if they are to."""
    tasks = scheduled(planned(recipes[method][0], **flags))
    loads = [t for task in tasks if isinstance(task, Together) for t in task.tasks]
    thetas = [task for task in (*tasks, *loads) if isinstance(task, LoadTheta)]
    assert thetas
    assert {task.device for task in thetas} == {device}


@pytest.mark.parametrize("method", METHODS.values())
def test_threads_change_the_last_digits_at_most(recipes, tmp_path, monkeypatch, method):
    """And nothing of `fisher`, which adds nothing up; threads divide its tensors otherwise."""
    monkeypatch.setattr(diagonal, "BLOCK", 7)
    recipe = {**recipes[method][0], "dtype": "float32"}
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(merged(recipe, tmp_path / str(threads)))
    finally:
        torch.set_num_threads(before)
    assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    if method == "fisher":
        assert_same(*found)


@pytest.mark.parametrize("method", METHODS.values())
def test_without_safetensors(recipes, tmp_path, method):
    recipe, plain = recipes[method]
    merged(recipe, tmp_path / "out", safe_serialization=False)
    found = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert_same(found, plain)


@pytest.mark.parametrize("lazy", [False, True])
def test_pickled_models_are_refused(tmp_path, lazy):
    """`--lazy-unpickle` is for them; a sidecar is of safetensors only."""
    a, b = (make_measured(tmp_path / n, seed=i)[0] for i, n in enumerate("ab"))
    torch.save(read(b), b / "pytorch_model.bin")
    (b / "model.safetensors").unlink()
    with pytest.raises(PlanningError) as info:
        merged(recipe_of(a, b), tmp_path / "out", lazy_unpickle=lazy)
    (problem,) = info.value.problems
    assert problem.startswith(f"{b}: {b} holds only pickled weights")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def devices(monkeypatch):
    """Let mergekit take this CPU for two accelerators: a thread each, and nothing to wait for."""
    nothing = types.SimpleNamespace(synchronize=lambda device: None)
    monkeypatch.setattr(multigpu_executor, "get_torch_accelerator_type", lambda *_: "cpu")
    monkeypatch.setattr(multigpu_executor, "get_torch_accelerator_count", lambda *_: 2)
    monkeypatch.setattr(multigpu_executor, "get_torch_accelerator_module", lambda *_: nothing)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    work = multigpu_executor.MultiGPUExecutor._device_worker

    def patient(self, *args, **kwargs):
        # mergekit 0.1.5 ends the thread that collects results without asking whether any are left
        # over, which is a matter of luck with tasks as small as these. Where another thread has
        # failed it is ended already, and nobody collects them.
        work(self, *args, **kwargs)
        while not (self.done_event.is_set() or self.task_completion_queue.empty()):
            time.sleep(1e-3)

    monkeypatch.setattr(multigpu_executor.MultiGPUExecutor, "_device_worker", patient)


@pytest.mark.parametrize("method", METHODS.values())
@pytest.mark.parametrize("options", [{}, {"low_cpu_memory": True, "async_write": True}])
def test_several_accelerators(recipes, tmp_path, devices, monkeypatch, method, options):
    """Islands of tasks in threads of their own; what layers share stays on one device."""
    recipe, plain = recipes[method]
    seen = set()
    execute = tasks.MergeTask.execute

    def noted(self, **inputs):

        seen.add(threading.get_ident())
        return execute(self, **inputs)

    monkeypatch.setattr(tasks.MergeTask, "execute", noted)
    assert_same(merged(recipe, tmp_path / "out", multi_gpu=True, **options), plain)
    assert len(seen) > 1


def test_no_tensor_is_made_where_the_device_is_not_said(recipes, tmp_path):
    """A worker of `--multi-gpu` has its own default device; here it holds no numbers at all."""
    for recipe, plain in recipes.values():
        tasks = planned(recipe)
        with torch.device("meta"):
            assert_same(run_planned(tasks), plain)


def test_rows_of_tokens_are_numbered_on_the_cpu(tmp_path):
    """Where the precisions are that they are taken of."""
    with torch.device("meta"):
        assert FirstRows(size=3).execute().tolist() == [0, 1, 2]
        places = types.SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 1, "c": 2})
        reference = ModelReference.parse("x")
        info = types.SimpleNamespace(
            permutations={reference: {0: 2, 1: -1, 2: 0}}, tokenizer=places
        )
        rows = TokenRows.model_construct(model=reference, tokenizer=None, size=4, forced=("c",))
        assert rows.execute(info).tolist() == [2, -1, ABSENT, ABSENT]


def test_converted_experts_on_several_accelerators(tmp_path, devices):
    folders = [make_measured(tmp_path / n, "mixtral", seed=i)[0] for i, n in enumerate("ab")]
    plain = merged(recipe_of(*folders), tmp_path / "plain")
    assert_same(merged(recipe_of(*folders), tmp_path / "out", multi_gpu=True), plain)


def test_what_a_thread_finds_wrong_is_one_message(recipes, tmp_path, devices, monkeypatch):
    recipe, _ = recipes["fisher"]
    folder = tmp_path / "damaged"
    shutil.copytree(recipe["models"][0]["model"], folder)
    path = folder / "sidecar" / "fisher.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    changed = {**recipe, "models": [{"model": str(folder)}, recipe["models"][1]]}
    with pytest.raises(SidecarError, match="checksum differs"):
        merged(changed, tmp_path / "out", multi_gpu=True)


class TestCrimes:
    """`--allow-crimes` mixes architectures: what the output has is merged, or nothing is."""

    @pytest.fixture
    def relatives(self, tmp_path, monkeypatch):
        """Two architectures of the same tensors, and one that has biases beside them."""
        sizes = families.FAMILIES["llama"][1]
        monkeypatch.setitem(families.FAMILIES, "mistral", ("MistralForCausalLM", sizes))
        untied = {**families.FAMILIES["qwen2"][1], "tie_word_embeddings": False}
        return {
            "llama": make_measured(tmp_path / "llama", "llama", seed=1),
            "mistral": make_measured(tmp_path / "mistral", "mistral", seed=2),
            "qwen2": make_measured(tmp_path / "qwen2", "qwen2", seed=3, **untied),
        }

    @pytest.mark.parametrize("first", ["llama", "mistral"])
    def test_of_the_same_tensors(self, relatives, tmp_path, first):
        chosen = [relatives["llama"], relatives["mistral"]]
        folders, thetas, fishers = zip(*chosen, strict=True)
        recipe = recipe_of(*folders, lambdas=[1, 2], base_model=str(relatives[first][0]))
        found = merged(recipe, tmp_path / "out", allow_crimes=True)
        assert_close(found, merge_oracle.merge(thetas, fishers, [1, 2], list(thetas[0])))
        config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
        assert config.model_type == first

    @pytest.mark.parametrize(("method", "kind"), [("regmean", "gram"), ("mats", "kfac")])
    def test_by_factors(self, relatives, tmp_path, method, kind):
        made = [
            make_described(tmp_path / f"described-{name}", name, kind, seed=seed)
            for seed, name in enumerate(("llama", "mistral"))
        ]
        folders = [m.folder for m in made]
        recipe = recipe_of(*folders, method=method, lambdas=[1, 2], base_model=str(folders[0]))
        found = merged(recipe, tmp_path / "out", allow_crimes=True)
        assert_close(found, merged_model(made, [1, 2]), rtol=1e-4, atol=1e-4)

    def test_not_unasked(self, relatives, tmp_path):
        """By mergekit itself."""
        recipe = recipe_of(relatives["llama"][0], relatives["mistral"][0])
        with pytest.raises(RuntimeError, match="--allow-crimes"):
            merged(recipe, tmp_path / "out")

    @pytest.fixture(params=["llama", "qwen2"])
    def first(self, request, relatives, monkeypatch):
        """mergekit describes the output by one of the models, and which is chance."""
        order = [request.param, *({"llama", "qwen2"} - {request.param})]
        references = [ModelReference.parse(str(relatives[name][0])) for name in order]
        monkeypatch.setattr(MergeConfiguration, "referenced_models", lambda _: references)

    def test_biases_that_the_output_has_no_place_for(self, relatives, tmp_path, first, caplog):
        chosen = [relatives["llama"], relatives["qwen2"]]
        folders, thetas, fishers = zip(*chosen, strict=True)
        recipe = recipe_of(*folders, base_model=str(folders[0]))
        found = merged(recipe, tmp_path / "out", allow_crimes=True)
        assert_close(found, merge_oracle.merge(thetas, fishers, [1, 1], list(thetas[0])))
        (record,) = [r for r in caplog.records if "is left out" in r.getMessage()]
        assert record.getMessage().startswith(
            f"{folders[1]} is a Qwen2ForCausalLM: what the output, a LlamaForCausalLM, has no "
            "place for is left out: model.layers.0.self_attn.k_proj.bias, "
        )

    def test_biases_that_one_lacks(self, relatives, tmp_path, first):
        folders = [relatives["llama"][0], relatives["qwen2"][0]]
        recipe = recipe_of(*folders, base_model=str(folders[1]))
        with pytest.raises(PlanningError) as info:
            merged(recipe, tmp_path / "out", allow_crimes=True)
        (problem,) = info.value.problems
        assert f"{folders[0]} lacks model.layers.0.self_attn.k_proj.bias" in problem
        assert "the line `exclude: [" in problem


def test_tensors_without_a_recipe_are_refused_before_any_is_read():
    """By `mergekit-pytorch`, `merge_state_dicts` and `merge_tensors`, also with sidecars given."""
    config = RawPyTorchMergeConfig.model_validate(
        {"merge_method": "mats", "models": [{"model": "./no-such-file.safetensors"}]}
    )
    tensors = [torch.zeros(2), torch.ones(2)]
    given = {"sidecar": ["./a/sidecar", "./b/sidecar"], "lambda": [1, 2]}
    for call in (
        lambda: plan_flat_merge(config, "out", False, False, MergeOptions()),
        lambda: merge_tensors(tensors, "regmean", parameters=given),
        lambda: merge_state_dicts([{"w": t} for t in tensors], "fisher", parameters=given),
    ):
        with pytest.raises(FisherMergekitError, match="write a recipe and run mergekit-yaml"):
            call()


@pytest.mark.slow
def test_mergekit_pytorch_says_one_sentence(recipes, tmp_path):
    recipe, _ = recipes["fisher"]
    models = [
        {"model": f"{folder}/model.safetensors", "parameters": {"sidecar": f"{folder}/sidecar"}}
        for folder in (entry["model"] for entry in recipe["models"])
    ]
    path = tmp_path / "raw.yml"
    path.write_text(yaml.safe_dump({"merge_method": "fisher", "models": models}))
    process = command("mergekit-pytorch", path, tmp_path / "out")
    assert process.returncode == 1
    assert "Traceback" not in process.stderr
    assert "Error: merge method 'fisher' cannot merge tensors that are handed" in process.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_mergekit_legacy_writes_a_parameter_that_is_not_ours(recipes, tmp_path):
    models = [
        arg for entry in recipes["fisher"][0]["models"] for arg in ("--merge", entry["model"])
    ]
    process = command("mergekit-legacy", tmp_path / "out", "--method", "fisher", *models)
    assert process.returncode == 1
    assert "parameters: unknown parameter 'normalize'" in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.slow
@pytest.mark.parametrize("shard_size", [None, "2KB"])
def test_models_that_change_between_two_merges_of_one_process(tmp_path, monkeypatch, shard_size):
    """Saved anew, in other shards; and other models of the same relative names."""
    names = ("./a", "./b")
    for turn, place in enumerate(("one", "one", "two")):
        folder = tmp_path / place
        shutil.rmtree(folder, ignore_errors=True)
        sizes = {"shard_size": shard_size if turn % 2 else None}
        made = [make_measured(folder / n, "llama", seed=10 * turn + i, **sizes)
                for i, n in enumerate("ab")]  # fmt: skip
        monkeypatch.chdir(folder)
        found = merged(recipe_of(*names), folder / "out")
        _, thetas, fishers = zip(*made, strict=True)
        assert_close(found, merge_oracle.merge(thetas, fishers, [1, 1], list(thetas[0])))


def test_by_the_command(recipes, tmp_path):
    """As a user spells the flags; nothing but shards and threads is different."""
    recipe, plain = recipes["fisher"]
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe))
    flags = (
        "-j", "2", "--low-cpu-memory", "--read-to-gpu", "--lazy-unpickle", "--async-write",
        "--write-threads", "2", "--clone-tensors", "--out-shard-size", "1K", "--random-seed", "3",
        "--no-copy-tokenizer", "--allow-crimes", "--quiet", "-v",
    )  # fmt: skip
    process = command("mergekit-yaml", path, tmp_path / "out", *flags)
    assert process.returncode == 0, process.stderr
    assert_same(read(tmp_path / "out"), plain)
    assert not (tmp_path / "out" / "tokenizer.json").exists()
