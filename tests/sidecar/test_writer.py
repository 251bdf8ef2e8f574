"""Written whole or not at all: what stands under a sidecar's name can be trusted at any moment."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from sidecars import KIND, measurement, open_and_load, rewrite_header, values, write

from fisher_mergekit.errors import SidecarError
from fisher_mergekit.sidecar import writer
from fisher_mergekit.sidecar.header import Header, ModelIdentity, WeightRecord
from fisher_mergekit.sidecar.location import holding, reading_places, writing_place
from fisher_mergekit.sidecar.reader import Sidecar, checksum, read_header


def same(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(value, found[name]) for name, value in expected.items()
    )


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("shard_size", [1 << 30, 64, 1])
    def test_what_was_written_is_read(self, tmp_path, dtype, shard_size):
        folder = write(tmp_path / "s", dtype=dtype, shard_size=shard_size)
        assert same(open_and_load(folder), values(dtype=dtype))

    def test_the_header_knows_sums_of_squares_and_checksums(self, tmp_path):
        sidecar = Sidecar(write(tmp_path / "s"), KIND)
        for name, tensor in values().items():
            expected = tensor.double().square().sum().item()
            assert sidecar.sum_of_squares(name) == pytest.approx(expected, rel=1e-12)
            assert sidecar.measurement.tensors[name].checksum == checksum(tensor)

    def test_one_file_travels_alone(self, tmp_path):
        folder = write(tmp_path / "s")
        lone = tmp_path / "renamed.safetensors"
        (folder / "fisher.safetensors").rename(lone)
        assert same(open_and_load(lone), values())
        assert Sidecar(lone, KIND).header.model == read_header(folder).model

    def test_the_same_content_gives_the_same_bytes_whenever_it_was_measured(self, tmp_path):
        first, second = (files(write(tmp_path / name, wall=w)) for name, w in (("a", 1), ("b", 2)))
        assert first.keys() == second.keys()
        differ = {name for name in first if first[name] != second[name]}
        assert differ == {"header.json"}  # the wall time stands there and nowhere else

    def test_shards_and_a_whole_file_replace_each_other_cleanly(self, tmp_path):
        whole = files(write(tmp_path / "s"))
        write(tmp_path / "s", shard_size=64)
        assert not (tmp_path / "s" / "fisher.safetensors").exists()
        assert same(open_and_load(tmp_path / "s"), values())
        assert files(write(tmp_path / "s")) == whole

    def test_no_shard_is_larger_than_asked_unless_one_tensor_is(self, tmp_path):
        folder = write(tmp_path / "s", shard_size=120)
        for shard in folder.glob("fisher-*"):
            names = Sidecar(folder, KIND)._tensors
            here = [info for info in names.values() if info.file == shard]
            assert sum(i.stop - i.start for i in here) <= 120 or len(here) == 1

    @pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
    def test_permissions_follow_the_umask(self, tmp_path, mask):
        before = os.umask(mask)
        try:
            folder = write(tmp_path / "s", shard_size=64)
        finally:
            os.umask(before)
        modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
        assert modes == {0o666 & ~mask}

    def test_unknown_keys_of_a_newer_header_are_kept(self, tmp_path):
        folder = write(tmp_path / "s")

        def add(content: dict) -> None:
            content["kinds"]["fisher"]["settings"]["novelty"] = 7
            content["novelty"] = "x"

        content = rewrite_header(folder, add)
        again = read_header(folder)
        assert json.loads(again.to_json()) == content


class TestTwoKinds:
    def test_each_survives_the_other_being_rewritten(self, tmp_path):
        folder = write(tmp_path / "s")
        write(folder, "gram", seed=1)
        assert same(open_and_load(folder, KIND), values(0))
        assert same(open_and_load(folder, "gram"), values(1))
        write(folder, seed=2, shard_size=64)
        assert same(open_and_load(folder, KIND), values(2))
        assert same(open_and_load(folder, "gram"), values(1))
        page = (folder / "README.md").read_text()
        assert "`fisher`" in page
        assert "`gram`" in page

    @pytest.mark.parametrize("digest", ["same", "other"])
    def test_kinds_of_different_tensors_of_a_model(self, tmp_path, digest):
        """A training of biases alone leaves Adam no state of the matrices that a Gram describes."""
        known = {
            name: WeightRecord(dtype="F32", shape=(4,), digest=which)
            for name, which in (("bias", "same"), ("weight", digest))
        }
        for kind, name, record in (
            (KIND, "weight", known["weight"].model_copy(update={"digest": "same"})),
            ("gram", "bias", known["bias"]),
        ):
            tensors = {name: torch.ones(4)}
            described = measurement(tensors).model_copy(update={"weights": {name: record}})
            identity = ModelIdentity(reference="./made-up", architecture="MadeUp")
            writer.write_sidecar(tmp_path, kind, identity, described, tensors, weights=known)
        expected = {"gram", KIND} if digest == "same" else {"gram"}
        assert set(read_header(tmp_path).kinds) == expected

    def test_a_kind_of_other_weights_is_disowned(self, tmp_path):
        folder = write(tmp_path / "s", "gram")
        write(folder, weights="other")
        assert set(read_header(folder).kinds) == {KIND}
        with pytest.raises(SidecarError, match="has no complete 'gram'"):
            Sidecar(folder, "gram")


class TestOtherPeoplesFiles:
    def test_a_model_s_own_readme_is_not_overwritten(self, tmp_path):
        (tmp_path / "README.md").write_text("# My model")
        folder = write(tmp_path)
        assert (folder / "README.md").read_text() == "# My model"
        assert same(open_and_load(folder), values())

    def test_our_own_page_is_renewed(self, tmp_path):
        folder = write(tmp_path / "s")
        page = (folder / "README.md").read_text()
        (folder / "README.md").write_text(page + "old")
        write(folder)
        assert (folder / "README.md").read_text() == page

    def test_files_of_other_names_stay(self, tmp_path):
        (tmp_path / "s").mkdir()
        others = (
            "notes.txt",
            "big.zip.partial",
            f"{KIND}-exact.safetensors",
            f"{KIND}_x.safetensors.index.json",
        )
        for name in others:
            (tmp_path / "s" / name).write_text("mine")
        write(tmp_path / "s")
        assert [(tmp_path / "s" / name).read_text() for name in others] == ["mine"] * 4


FULL = OSError(errno.ENOSPC, "No space left on device")


class Killed(BaseException):
    """A process that ends in the middle."""


def operations(monkeypatch, fail_at, error):
    """Count the calls that touch the disk, and fail at one of them; return the counter."""
    calls = []

    def failing(function):
        def call(*arguments, **options):
            calls.append(function.__name__)
            if len(calls) == fail_at:
                raise error
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(writer, "save_file", failing(writer.save_file))
    monkeypatch.setattr(writer, "_write_text", failing(writer._write_text))
    monkeypatch.setattr(writer.os, "replace", failing(os.replace))
    return calls


def count_operations(folder, **options):
    with pytest.MonkeyPatch.context() as patch:
        calls = operations(patch, None, None)
        write(folder, **options)
    return len(calls)


@pytest.mark.parametrize("error", [FULL, Killed()], ids=["disk full", "killed"])
@pytest.mark.parametrize("shard_size", [1 << 30, 64], ids=["whole", "sharded"])
class TestInterrupted:
    """At every single operation on the disk."""

    def interrupt(self, folder, error, at, **options):
        with pytest.MonkeyPatch.context() as patch:
            operations(patch, at, error)
            expected = SidecarError if isinstance(error, OSError) else Killed
            with pytest.raises(expected) as caught:
                write(folder, **options)
        if expected is SidecarError:
            assert "No space left on device" in caught.value.message
            assert "make room or choose another folder" in caught.value.message

    def test_a_new_sidecar_is_whole_or_absent(self, tmp_path, error, shard_size):
        steps = count_operations(tmp_path / "count", shard_size=shard_size)
        for at in range(1, steps + 1):
            folder = tmp_path / str(at)
            self.interrupt(folder, error, at, shard_size=shard_size)
            with pytest.raises(SidecarError):
                Sidecar(folder, KIND)
            assert not list(folder.glob("*.partial"))
            assert same(open_and_load(write(folder)), values())

    def test_an_old_sidecar_stays_whole_or_is_withdrawn(self, tmp_path, error, shard_size):
        """Never old tensors under a new header, nor new ones under the old."""
        steps = count_operations(
            write(tmp_path / "count", shard_size=64), seed=1, shard_size=shard_size
        )
        outcomes = set()
        for at in range(1, steps + 1):
            folder = write(tmp_path / str(at), shard_size=64)
            write(folder, "gram", seed=5)
            self.interrupt(folder, error, at, seed=1, shard_size=shard_size)
            try:
                assert same(open_and_load(folder), values(0))
                outcomes.add("old")
            except SidecarError:
                outcomes.add("withdrawn")
            assert same(open_and_load(folder, "gram"), values(5))
            assert same(open_and_load(write(folder)), values())
        assert outcomes == {"old", "withdrawn"}


@pytest.mark.slow
def test_a_real_limit_on_file_size_leaves_nothing(tmp_path):
    """The operating system refuses in the middle of a file, not we."""
    program = """
import resource, sys, torch
from pathlib import Path
from fisher_mergekit.errors import SidecarError
from fisher_mergekit.sidecar import writer
from sidecars import KIND, measurement, write
import sidecars

big = {"w": torch.rand(300, 1000)}
sidecars.values = lambda *_: big
folder = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write(folder)
except SidecarError as error:
    print(error.message)
print(sorted(folder.parent.iterdir()))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "s")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(__file__))},
    )
    assert done.returncode == 0, done.stderr
    said, left = done.stdout.splitlines()
    assert "cannot write the sidecar" in said
    assert "Nothing partial was left" in said
    assert left == "[]"


def test_leftovers_of_a_killed_process_are_swept_up(tmp_path):
    folder = write(tmp_path / "s")
    (folder / "fisher-00001-of-00009.safetensors.partial").write_bytes(b"half")
    write(folder)
    assert not list(folder.glob("*.partial"))


class TestWhere:
    @pytest.fixture(autouse=True)
    def _home(self, tmp_path, monkeypatch):
        monkeypatch.setenv("FISHER_MERGEKIT_HOME", str(tmp_path / "home"))

    def test_a_local_model_keeps_its_sidecar(self, tmp_path):
        assert writing_place(str(tmp_path)) == tmp_path / "sidecar"
        assert writing_place(str(tmp_path), base="org/base") == tmp_path / "sidecar-org--base"
        assert reading_places(str(tmp_path), None, tmp_path) == (tmp_path / "sidecar",)

    def test_a_hub_model_s_sidecar_is_written_to_the_user_s_cache(self, tmp_path):
        assert writing_place("org/model") == tmp_path / "home" / "org--model"
        assert writing_place("org/model", "v1") == tmp_path / "home" / "org--model@v1"
        assert writing_place("org/lora", "v1", "org/base@v2").name == "org--lora@v1+org--base@v2"
        assert writing_place("../no/such/folder").parent == tmp_path / "home"

    def test_what_the_user_measured_is_read_before_what_was_published(self, tmp_path):
        snapshot, own = tmp_path / "snapshot", tmp_path / "home" / "org--model"
        published = snapshot / "sidecar"
        snapshot.mkdir()
        places = reading_places("org/model", None, snapshot)
        assert places == (own, published)
        published.mkdir()
        assert holding(places, "fisher") == own
        (published / "fisher.safetensors").touch()
        (published / "kfac-00001-of-00002.safetensors").touch()
        assert holding(places, "fisher") == holding(places, "kfac") == published
        assert holding(places, "fish") == own  # a kind, not the beginning of one
        own.mkdir(parents=True)
        assert holding(places, "fisher") == published
        (own / "kfac.safetensors").touch()  # of which nobody's Fisher is hidden
        assert holding(places, "fisher") == published
        assert holding(places, "kfac") == own


def test_a_header_survives_its_own_serialisation(tmp_path):
    header = Header(
        model={"reference": "./ä", "architecture": "X"}, kinds={KIND: measurement(values())}
    )
    assert Header.from_json(header.to_json(), tmp_path) == header
    assert "wall_seconds" not in header.to_json(wall_time=False)
    assert "ä" in header.to_json()


def test_two_that_write_at_once_write_one_after_the_other(tmp_path):
    """Locks hold between open files, so threads stand in for processes."""

    def write_often(seed):
        for _ in range(20):
            write(tmp_path / "s", seed=seed)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(write_often, seed) for seed in (1, 2)]:
            done.result()
    found = open_and_load(tmp_path / "s")
    assert any(same(found, values(seed=seed)) for seed in (1, 2))
