"""Whatever happens to a sidecar's files, reading ends in the truth or in one named error."""

from __future__ import annotations

import json
import os
import pickle
import re
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from sidecars import KIND, open_and_load, rewrite_header, write

from fisher_mergekit.errors import CheckpointError, SidecarError, SidecarMissing
from fisher_mergekit.sidecar.checkpoint import Checkpoint, read_tensor_infos
from fisher_mergekit.sidecar.reader import Sidecar, read_header


@pytest.fixture
def sidecar(tmp_path):
    return write(tmp_path / "sidecar")


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("intact") / "sidecar")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def damaged(folder, files, **changes):
    """Write a sidecar's files with changed bytes; None leaves a file out."""
    folder.mkdir(exist_ok=True)
    for name, content in {**files, **changes}.items():
        if content is not None:
            (folder / name).write_bytes(content)
        else:
            (folder / name).unlink(missing_ok=True)
    return folder


FILE = f"{KIND}.safetensors"
PICKLE = pickle.dumps({"a": [1.0] * 50})


@pytest.mark.parametrize(
    ("name", "content", "phrase"),
    [
        (FILE, None, "has no fisher.safetensors"),
        (FILE, b"", "is empty"),
        (FILE, b"\x07", "is not a safetensors file, or is cut short"),
        (FILE, PICKLE, "is a pickle, not safetensors. Pickles can run code and are not read"),
        (FILE, b"PK\x03\x04" + bytes(100), "is a pickle"),
        (FILE, b"not tensors at all, but text of some length", "is not a safetensors file"),
        (FILE, (2).to_bytes(8, "little") + b"[]", "is not a readable safetensors file"),
        ("header.json", b"", "is not a readable sidecar header"),
        ("header.json", b"{", "is not a readable sidecar header"),
        ("header.json", b"\xff\xfe\x00", "is not a readable sidecar header"),
        ("header.json", b"[]", "is not a sidecar header (its format is None)"),
        ("header.json", b'{"format": "fisher_mergekit.sidecar", "format_version": 2}',
         "has sidecar format version 2; this fisher_mergekit reads version 1"),
        ("header.json", b'{"format": "fisher_mergekit.sidecar", "format_version": 1}',
         "is corrupt: its content is not what was written"),
    ],
)  # fmt: skip
def test_each_damage_has_its_sentence(intact, tmp_path, name, content, phrase):
    folder = damaged(tmp_path / "s", intact, **{name: content})
    with pytest.raises(SidecarError) as error:
        open_and_load(folder)
    assert phrase in error.value.message


def test_a_missing_sidecar_is_missing_not_damaged(intact, tmp_path):
    with pytest.raises(SidecarMissing, match="there is no sidecar at"):
        Sidecar(tmp_path / "nowhere", KIND)
    folder = damaged(tmp_path / "s", intact, **{"header.json": None})
    with pytest.raises(SidecarMissing, match="there is no sidecar at"):
        Sidecar(folder, KIND)
    with pytest.raises(SidecarMissing, match="has no complete 'gram'; it has fisher"):
        Sidecar(damaged(tmp_path / "t", intact), "gram")


@pytest.mark.parametrize("cut", [1, 9, 100, -1, -4, -40])
def test_a_truncated_file_is_told(sidecar, cut):
    path = sidecar / FILE
    size = path.stat().st_size
    os.truncate(path, cut if cut > 0 else size + cut)
    with pytest.raises(SidecarError, match=r"cut short|truncated|not a readable"):
        Sidecar(sidecar, KIND)


def test_a_file_that_has_grown_is_told(sidecar):
    with (sidecar / FILE).open("ab") as file:
        file.write(b"\0\0\0\0")
    with pytest.raises(SidecarError, match="truncated or has grown"):
        Sidecar(sidecar, KIND)


def test_a_header_that_cannot_be_read_is_one_sentence(intact, tmp_path):
    folder = damaged(tmp_path / "s", intact, **{"header.json": None})
    (folder / "header.json").mkdir()
    with pytest.raises(SidecarError, match=r"cannot read .*header\.json"):
        Sidecar(folder, KIND)


@settings(max_examples=150)
@given(data=st.data())
def test_a_flipped_bit_is_found_or_changes_nothing(intact, tmp_path_factory, data):
    """Anywhere in either file: the outcome is an error of ours, or the very same tensors."""
    name = data.draw(st.sampled_from([FILE, "header.json"]))
    content = bytearray(intact[name])
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    folder = damaged(tmp_path_factory.getbasetemp() / "flipped", intact, **{name: bytes(content)})
    expected = open_and_load(damaged(tmp_path_factory.getbasetemp() / "whole", intact))
    try:
        found = open_and_load(folder)
    except SidecarError:
        return
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, found[key]) for key, value in expected.items())


@settings(max_examples=100)
@given(data=st.data())
def test_a_lone_file_with_a_flipped_bit_raises_nothing_foreign(intact, tmp_path_factory, data):
    content = bytearray(intact[FILE])
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.getbasetemp() / "lone.safetensors"
    path.write_bytes(bytes(content))
    with suppress(SidecarError):
        open_and_load(path)


def test_a_lone_file_of_a_dtype_that_safetensors_does_not_know(intact, tmp_path):
    path = tmp_path / "lone.safetensors"
    path.write_bytes(intact[FILE].replace(b'"dtype":"F32"', b'"dtype":"F99"'))
    with pytest.raises(SidecarError, match=r"cannot read the sidecar .*lone\.safetensors: .*`F99`"):
        open_and_load(path)


def test_a_flipped_bit_of_a_value_is_told_with_the_remedy(sidecar):
    path = sidecar / FILE
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(bytes(content))
    with pytest.raises(SidecarError, match=r"is corrupt: the bytes of .* Measure the model again"):
        open_and_load(sidecar)


def test_a_shard_too_few_is_told(tmp_path):
    folder = write(tmp_path / "sidecar", shard_size=64)
    shards = sorted(folder.glob("fisher-*"))
    shards[1].unlink()
    with pytest.raises(SidecarError, match=rf"{shards[1].name} does not exist"):
        Sidecar(folder, KIND)


def test_shards_of_two_measurements_are_not_mixed(tmp_path):
    """An index that promises what a shard does not hold."""
    folder = write(tmp_path / "sidecar", shard_size=64)
    first, second = sorted(folder.glob("fisher-*"))[:2]
    second.write_bytes(first.read_bytes())
    with pytest.raises(SidecarError, match="the index and the shards do not belong together"):
        Sidecar(folder, KIND)


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": 5}', "[]"])
def test_a_damaged_index_is_told(tmp_path, content):
    folder = write(tmp_path / "sidecar", shard_size=64)
    (folder / "fisher.safetensors.index.json").write_text(content)
    with pytest.raises(SidecarError, match="is not a readable shard index"):
        Sidecar(folder, KIND)


def test_of_a_whole_file_and_shards_one_is_another_model(tmp_path):
    """As after two merges into one folder; mergekit reads the shards, transformers the file."""
    tensors = {"a": torch.zeros(3), "b": torch.ones(3)}
    save_file(tensors, tmp_path / "model-1.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model-1.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(tensors, tmp_path / "model.safetensors")
    assert set(Checkpoint(tmp_path)) == {"a", "b"}
    for other in ({**tensors, "b": torch.zeros(3)}, {"a": tensors["a"]}):
        save_file(other, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match="holds two models, and b differs"):
            Checkpoint(tmp_path)


def test_a_header_that_nests_without_end_is_told(tmp_path):
    folder = write(tmp_path / "sidecar")
    (folder / "header.json").write_text("[" * 100_000)
    with pytest.raises(SidecarError, match="is not a readable sidecar header"):
        read_header(folder)


def test_an_index_cannot_point_out_of_its_folder(tmp_path):
    folder = write(tmp_path / "sidecar", shard_size=64)
    index = folder / "fisher.safetensors.index.json"
    shard = sorted(folder.glob("fisher-*"))[0]
    shard.rename(tmp_path / "elsewhere.safetensors")
    index.write_text(index.read_text().replace(shard.name, "../elsewhere.safetensors"))
    with pytest.raises(SidecarError, match="outside"):
        Sidecar(folder, KIND)


def test_a_safetensors_file_without_our_header_is_told(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / FILE)
    with pytest.raises(SidecarError, match="has no header in its metadata"):
        read_header(tmp_path / FILE)


def test_a_header_of_other_tensors_is_told(intact, tmp_path):
    def rename(content):
        for part in ("tensors", "weights"):
            records = content["kinds"][KIND][part]
            records["a.b"] = records.pop("a.bias")

    folder = damaged(tmp_path / "s", intact)
    rewrite_header(folder, rename)
    with pytest.raises(SidecarError, match=r"is partial: .* for example a\.b"):
        Sidecar(folder, KIND)


def test_a_flipped_digit_in_the_header_is_told(intact, tmp_path):
    text = intact["header.json"].decode()
    number = re.search(r'"sum_of_squares": (\d)', text)
    flipped = text[: number.start(1)] + chr(ord(number[1]) ^ 1) + text[number.end(1) :]
    folder = damaged(tmp_path / "s", intact, **{"header.json": flipped.encode()})
    with pytest.raises(SidecarError, match="is corrupt: its content is not what was written"):
        Sidecar(folder, KIND)


def test_a_checkpoint_says_what_it_lacks(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors and no model\.safe"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model-00001-of-00002.bin").touch()
    with pytest.raises(CheckpointError, match="holds only pickled weights"):
        Checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_tensor_infos(tmp_path / "none.safetensors")
