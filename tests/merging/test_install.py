"""What is done to mergekit: methods registered, one function wrapped, nothing else."""

import pytest
from mergekit import merge_methods
from mergekit.plan import MergePlanner
from models import make_measured
from running import assert_close, command, merged, recipe_of

from fisher_mergekit import startup
from fisher_mergekit.errors import UnsupportedMergekit
from fisher_mergekit.merging import install
from fisher_mergekit.merging.method import PlannedMethod
from fisher_mergekit.methods import METHODS


def test_every_row_is_registered_once():
    install.register()
    install.register()
    for name, row in METHODS.items():
        method = merge_methods.get(name)
        assert isinstance(method, PlannedMethod)
        assert [p.name for p in method.spec.shared_parameters] == list(row.keys)
        assert {p.name for p in method.spec.input_parameters} == {"lambda", "weight", "sidecar"}


def test_startup_hook_reports_for_every_method():
    """The hook must not import the table, so it repeats the names."""
    assert set(startup.METHODS) == set(METHODS)


def test_patch_is_put_once():
    patched = MergePlanner._plan
    install.patch()
    assert MergePlanner._plan is patched
    assert not hasattr(patched.__wrapped__, "__wrapped__")


def test_other_methods_go_to_mergekits_own_code(tmp_path, monkeypatch):
    a, theta_a, _ = make_measured(tmp_path / "a", "llama", seed=1)
    b, theta_b, _ = make_measured(tmp_path / "b", "llama", seed=2)
    monkeypatch.setattr("fisher_mergekit.merging.planner.plan", None)  # a call would fail
    recipe = recipe_of(a, b, method="linear", parameters={"weight": 1, "exclude": "unknown here"})
    found = merged(recipe, tmp_path / "out")
    assert_close(found, {n: (theta_a[n] + theta_b[n]) / 2 for n in theta_a})


@pytest.mark.parametrize("version", ["0.1.5", "0.1.5.post1", "0.1.6.dev0", "0.1.12"])
def test_supported_versions(version):
    install.check_version(version)


@pytest.mark.parametrize("version", ["0.0.6", "0.1.4", "0.2.0", "1.0"])
def test_unsupported_versions(version):
    with pytest.raises(UnsupportedMergekit, match=rf"mergekit {version} is installed.*pip install"):
        install.check_version(version)


def test_a_drifted_interface_is_named():
    def plan_tensor(self, weight, tensors): ...

    with pytest.raises(UnsupportedMergekit, match=r"plan_tensor takes no models, weights_in"):
        install.check_interface([(plan_tensor, ("weight", "weights_in", "models"))])


def test_a_name_that_is_taken(monkeypatch):
    class Other:
        spec = merge_methods.get("linear").spec

    taken = Other()
    taken.spec = type("Spec", (), {"name": "fisher"})()
    monkeypatch.setattr(merge_methods, "registered_methods", lambda: (taken,))
    with pytest.raises(UnsupportedMergekit, match="already knows another merge method"):
        install.register()


@pytest.mark.slow
def test_mergekit_pytorch_is_refused(tmp_path):
    a, _, _ = make_measured(tmp_path / "a", "llama", seed=1)
    b, _, _ = make_measured(tmp_path / "b", "llama", seed=2)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"merge_method: fisher\nmodels: [{{model: {a}/model.safetensors}}, "
        f"{{model: {b}/model.safetensors}}]\n"
    )
    process = command("mergekit-pytorch", recipe, tmp_path / "out")
    assert process.returncode == 1
    assert "Traceback" not in process.stderr
    assert "write a recipe and run mergekit-yaml" in process.stderr
    assert not list((tmp_path / "out").glob("*.safetensors"))
