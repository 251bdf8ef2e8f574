"""One look through a tensor's bytes: their checksum, and what kind of numbers they are."""

from __future__ import annotations

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from fisher_mergekit.sidecar import reader

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# A zero with a minus sign is one, but scanning leaves that to others.
ODD = {"NaN": torch.nan, "infinity": torch.inf, "a minus sign": -1e-7, "a negative zero": -0.0}


def values(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros, subnormal, ordinary and the largest numbers."""
    info = torch.finfo(dtype)
    some = torch.tensor([0.0, info.smallest_normal / 4, 1.0, info.max], dtype=dtype)
    return some.repeat(count // 4 + 1)[:count]


@given(
    blocks=st.integers(0, 2), more=st.integers(-1, 1), dtype=st.sampled_from(DTYPES)
)  # ends of blocks are where a loop goes wrong
def test_the_checksum_is_that_of_all_bytes(blocks: int, more: int, dtype: torch.dtype) -> None:
    count = max(0, blocks * reader.SCANNED // dtype.itemsize + more)
    tensor = values(count, dtype)
    expected = xxhash.xxh3_128_hexdigest(tensor.view(torch.uint8).numpy().tobytes())
    assert reader.scan(tensor) == (expected, True)


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinity_and_minus_signs_are_seen_wherever_they_stand(
    odd: str, dtype: torch.dtype
) -> None:
    count = reader.SCANNED // dtype.itemsize + 10
    for place in (0, count // 2, count - 11, count - 10, count - 1):
        tensor = values(count, dtype)
        tensor[place] = ODD[odd]
        assert not reader.scan(tensor)[1]


def test_a_matrix_that_does_not_lie_in_one_piece() -> None:
    matrix = torch.rand(30, 50)
    assert reader.scan(matrix.T) == reader.scan(matrix.T.contiguous())
    assert reader.checksum(matrix.T) != reader.checksum(matrix)
