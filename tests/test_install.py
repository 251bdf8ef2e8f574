"""Installing for real: pip and uv, wheel and editable, each in a virtual environment of its own.

An environment holds nothing but links to the libraries of the one that runs the tests (all but
our own package), so nothing is downloaded and our start-up files are read as on a user's machine.
"""

import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from fisher_mergekit import methods, startup

REPOSITORY = Path(__file__).parents[1]
OURS = ("fisher_mergekit", "_fisher_mergekit", "__editable__")
GET_FISHER = "from mergekit import merge_methods; print(merge_methods.get('fisher').spec.name)"
GET_LINEAR = GET_FISHER.replace("'fisher'", "'linear'")

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Environment:
    """A virtual environment under `root`."""

    root: Path

    @property
    def interpreter(self) -> str:
        return str(self.root / "bin" / "python")

    @property
    def packages(self) -> Path:
        (folder,) = self.root.glob("lib/python*/site-packages")
        return folder

    def run(self, *command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command with this environment's interpreter, outside the repository."""
        # __pycache__ is wanted: it is the one thing of ours that no installer has written.
        unwanted = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", startup.OFF_SWITCH)
        clean = {k: v for k, v in os.environ.items() if k not in unwanted}
        return subprocess.run(
            [self.interpreter, *command],
            env={**clean, "HF_HUB_OFFLINE": "1", **environment},
            cwd=self.root,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def says(self, *command: str | Path, **environment: str) -> str:
        """Run a command that must succeed, and return what it prints."""
        done = self.run(*command, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def script(self, name: str) -> Path:
        """Return the console script of a library, from the environment that runs the tests."""
        return Path(sysconfig.get_path("scripts")) / name

    def files(self) -> set[str]:
        paths = {str(path.relative_to(self.root)) for path in self.root.rglob("*")}
        return paths - {".lock"}  # uv's own, for the environment

    def modules_at_start(self) -> set[str]:
        return set(self.says("-c", "import sys; print(*sys.modules)").split())


def new_environment(root: Path) -> Environment:
    """Make a virtual environment that sees every library of this one, except our own package."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root], check=True)
    libraries = root / "libraries"
    libraries.mkdir()
    for name in ("purelib", "platlib"):
        for entry in Path(sysconfig.get_path(name)).iterdir():
            link = libraries / entry.name
            if not entry.name.startswith(OURS) and entry.suffix != ".pth" and not link.exists():
                link.symlink_to(entry)
    environment = Environment(root)
    (environment.packages / "libraries.pth").write_text(f"{libraries}\n")
    return environment


def installer(tool: str, environment: Environment) -> list[str]:
    """Return the command line that `install` and `uninstall` are appended to."""
    if tool == "uv":
        from uv import find_uv_bin

        return [find_uv_bin(), "pip"]
    return [environment.interpreter, "-m", "pip"]


def install(tool: str, environment: Environment, *what: str | Path) -> None:
    # The build back end is linked too, so that no test depends on a package index.
    flags = ["--no-deps", "--no-build-isolation"]
    flags += ["--no-cache", "--python", environment.interpreter] if tool == "uv" else []
    run_tool([*installer(tool, environment), "install", *flags, *map(str, what)])


def uninstall(tool: str, environment: Environment) -> None:
    flags = ["--python", environment.interpreter] if tool == "uv" else ["--yes"]
    run_tool([*installer(tool, environment), "uninstall", *flags, "fisher_mergekit"])


def run_tool(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr


@dataclass(frozen=True)
class Installation:
    """An environment with our package, and what it was like before."""

    tool: str
    environment: Environment
    files_before: set[str]
    modules_before: set[str]


WAYS = {
    "pip-wheel": ("pip", (".",)),
    "pip-editable": ("pip", ("-e", ".")),
    "uv-wheel": ("uv", (".",)),
    "uv-editable": ("uv", ("-e", ".")),
}


@pytest.fixture(scope="module", params=WAYS)
def installed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Installation:
    tool, what = WAYS[request.param]
    environment = new_environment(tmp_path_factory.mktemp(request.param) / "venv")
    modules = environment.modules_at_start()
    files = environment.files()
    install(tool, environment, *(str(REPOSITORY) if word == "." else word for word in what))
    return Installation(tool, environment, files, modules)


@pytest.fixture(scope="module")
def wheel_environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with our wheel, for tests that put something else in its way."""
    environment = new_environment(tmp_path_factory.mktemp("wheel") / "venv")
    install("pip", environment, REPOSITORY)
    return environment


def test_mergekit_knows_our_methods(installed: Installation) -> None:
    assert installed.environment.says("-c", GET_FISHER).splitlines()[-1] == "fisher"


@pytest.mark.parametrize("command", ["mergekit-yaml", "mergekit-multi"])
def test_mergekits_own_commands_run(installed: Installation, command: str) -> None:
    said = installed.environment.says(installed.environment.script(command), "--help")
    assert f"Usage: {command}" in said


def test_our_command_is_there(installed: Installation) -> None:
    said = installed.environment.says(installed.environment.root / "bin/mergekit-fisher", "--help")
    assert "precompute" in said


def test_plain_mergekit_yaml_reaches_our_planning(installed: Installation, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 16}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=1, **sizes))
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    models = [{"model": str(tmp_path / name)} for name in "ab"]
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(yaml.safe_dump({"merge_method": "fisher", "models": models}))

    done = installed.environment.run(
        installed.environment.script("mergekit-yaml"), recipe, tmp_path / "out"
    )

    assert done.returncode != 0
    assert "mergekit-fisher precompute" in done.stderr
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_start_of_python_loads_nothing_of_ours(installed: Installation) -> None:
    # With a .start file it is Python 3.15 itself that imports what the file names.
    ours = {"fisher_mergekit", "fisher_mergekit.startup", "pkgutil"}
    allowed = ours if sys.version_info >= (3, 15) else set()
    assert installed.environment.modules_at_start() - installed.modules_before <= allowed


def test_the_off_switch_leaves_mergekit_alone(installed: Installation) -> None:
    done = installed.environment.run("-c", GET_FISHER, **{startup.OFF_SWITCH: "1"})
    assert "Unimplemented merge method fisher" in done.stderr


def test_uninstalling_leaves_nothing_behind(installed: Installation) -> None:
    """The last test of an installation: afterwards it is gone."""
    environment = installed.environment
    assert environment.files() > installed.files_before
    uninstall(installed.tool, environment)
    assert environment.files() == installed.files_before
    done = environment.run("-c", "pass")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "Unimplemented merge method fisher" in environment.run("-c", GET_FISHER).stderr


def test_the_hook_and_the_table_name_the_same_methods() -> None:
    assert tuple(methods.METHODS) == startup.METHODS


def pretend_version(folder: Path, version: str) -> None:
    information = folder / f"mergekit-{version}.dist-info"
    information.mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: mergekit\nVersion: {version}\n"
    (information / "METADATA").write_text(text)


def assert_only_our_methods_complain(
    environment: Environment, first_path: Path, *words: str
) -> None:
    linear = "from mergekit import merge_methods, plan; print(merge_methods.get('linear'))"
    environment.says("-c", linear, PYTHONPATH=str(first_path))
    done = environment.run("-c", GET_FISHER, PYTHONPATH=str(first_path))
    assert done.returncode != 0
    for word in words:
        assert word in done.stderr


def test_a_newer_mergekit_is_refused_at_the_use_of_our_methods(
    wheel_environment: Environment, tmp_path: Path
) -> None:
    pretend_version(tmp_path, "0.2.0")
    assert_only_our_methods_complain(
        wheel_environment, tmp_path, "UnsupportedMergekit", "0.2.0", "0.1.5"
    )


def test_an_older_mergekit_with_another_architecture_is_refused_too(
    wheel_environment: Environment, tmp_path: Path
) -> None:
    pretend_version(tmp_path, "0.1.4")
    (tmp_path / "mergekit").mkdir()
    (tmp_path / "mergekit/__init__.py").touch()
    (tmp_path / "mergekit/plan.py").write_text("from mergekit import merge_methods\n")
    (tmp_path / "mergekit/merge_methods.py").write_text("def get(method):\n    return method\n")
    assert_only_our_methods_complain(
        wheel_environment, tmp_path, "UnsupportedMergekit", "0.1.4", "0.1.5"
    )


def test_a_wing_that_cannot_be_imported_is_told_at_the_use_of_our_methods(
    tmp_path: Path,
) -> None:
    environment = new_environment(tmp_path / "venv")
    install("pip", environment, REPOSITORY)
    damaged = environment.packages / "fisher_mergekit/merging/install.py"
    damaged.write_text("raise OSError('half of this file is missing')\n")
    assert_only_our_methods_complain(
        environment, tmp_path, "OSError: half of this file", "pip install --force-reinstall"
    )


def test_a_package_removed_by_hand_does_not_disturb_python(tmp_path: Path) -> None:
    environment = new_environment(tmp_path / "venv")
    install("pip", environment, REPOSITORY)
    (environment.packages / "fisher_mergekit").rename(tmp_path / "moved")
    if sys.version_info >= (3, 15):  # there Python itself imports what a .start file names
        (environment.packages / "fisher_mergekit.start").unlink()
    done = environment.run("-c", "pass")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
