"""Memory for results."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def new_tensor(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor with no values yet.

    On a CPU numpy gets its memory, which asks Linux for huge pages where there is much of it: what
    a process has never used it is given page by page, at its first touch, and so four times slower
    in small ones.
    """
    if device.type != "cpu" or not shape.numel():
        return torch.empty(shape, dtype=dtype, device=device)
    memory = np.empty(shape.numel() * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(memory).view(dtype).view(shape)
