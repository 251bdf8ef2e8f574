"""A point of the frontier is the checkpoint that `mergekit-yaml` writes."""

import pytest
import torch
from models import make_measured, read
from running import command

from fisher_mergekit.study.frontier import COMPARED, read_bodies
from fisher_mergekit.study.heads import graft

FISHER = """
merge_method: fisher
base_model: {first}
models:
  - {{model: {first}, parameters: {{lambda: {share}}}}}
  - {{model: {second}, parameters: {{lambda: {rest}}}}}
parameters: {{exclude: [classifier]}}
dtype: float32
"""
LINEAR = """
merge_method: linear
models:
  - {{model: {first}, parameters: {{weight: {share}}}}}
  - {{model: {grafted}, parameters: {{weight: {rest}}}}}
dtype: float32
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", COMPARED)
def test_a_merge_in_memory_is_the_merge_on_disk(method, tmp_path):
    first, theirs, _ = make_measured(tmp_path / "first", seed=1, num_labels=2)
    second, _, _ = make_measured(tmp_path / "second", seed=2, num_labels=3, scale=1e-3)
    grafted = tmp_path / "grafted"
    graft(second, first, grafted)
    text = (FISHER if method == "fisher" else LINEAR).format(
        first=first, second=second, grafted=grafted, share=0.3, rest=0.7
    )
    (tmp_path / "recipe.yml").write_text(text, encoding="utf-8")
    done = command("mergekit-yaml", tmp_path / "recipe.yml", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    on_disk = read(tmp_path / "merged")
    in_memory = read_bodies([first, second]).merge(method, [0.3, 0.7])
    for name, tensor in on_disk.items():
        if "classifier" in name:
            assert torch.equal(tensor, theirs[name])
        else:
            torch.testing.assert_close(tensor, in_memory[name], rtol=1e-6, atol=1e-6)
    assert in_memory.keys() == {name for name in on_disk if "classifier" not in name}
