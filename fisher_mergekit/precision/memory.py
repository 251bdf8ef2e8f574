"""Memory for results."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def new_tensor(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor with no values yet.

    On a CPU it is numpy's memory. Of 4 MiB and more numpy asks Linux to give it in huge pages.
    Memory that a process has not used before is given page by page, as each is first touched, and
    in small pages that takes three times as long.
    """
    if device.type != "cpu" or not shape.numel():
        return torch.empty(shape, dtype=dtype, device=device)
    memory = np.empty(shape.numel() * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(memory).view(dtype).view(shape)
