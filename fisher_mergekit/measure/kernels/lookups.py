"""A matrix that is multiplied by and looked up in: the two gradients meet before the square.

A tied head's gradient is P + S: a product P of all rows, and sums S of values in the rows that were
looked up. (P + S)² = P² + S (2P + S), and S is zero but for a few rows: so P² goes the fast way,
and the rest is formed for those rows only, from the tokens again, in O(b t² i).
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_meeting(
    total_oi: Tensor, rows_bto: Tensor, cols_bti: Tensor, ids_bu: Tensor, values_bui: Tensor
) -> None:
    """Add Σ_b S (2P + S) to `total_oi`, in place; Σ_b P² has been added before.

    Args:
        total_oi: float32 accumulator.
        rows_bto: of P = Σ_t rows_bto cols_bti.
        cols_bti: likewise.
        ids_bu: which row of the matrix each token looked up.
        values_bui: the gradient of what it got.
    """
    values = values_bui.float()
    # Token u stands for all tokens of its example with the same id if it is the first of them.
    same_buw = ids_bu[:, :, None] == ids_bu[:, None, :]
    is_first_bu = same_buw.int().argmax(2) == torch.arange(ids_bu.shape[1], device=ids_bu.device)
    sums = torch.bmm(same_buw.to(values.dtype), values)
    looked_up = ids_bu[:, None, :].expand(-1, rows_bto.shape[1], -1)
    products = torch.bmm(rows_bto.gather(2, looked_up).mT.float(), cols_bti.float())
    added = (sums * (2 * products + sums)).mul_(is_first_bu[:, :, None])
    # This accumulation is in a fixed order on GPUs too, unlike index_add_.
    total_oi.index_put_((ids_bu.reshape(-1),), added.flatten(0, 1), accumulate=True)
    # Where P + S is zero, P² and S (2P + S) cancel only up to rounding.
    total_oi.clamp_(min=0)
