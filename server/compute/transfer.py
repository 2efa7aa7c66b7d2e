"""Small numbers from the host to the device."""

from typing import Any

import torch
from torch import Tensor


def to_device(numbers: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """``numbers``, whatever ``torch.tensor`` takes, on ``device``.

    To CUDA from pinned memory, so that the host does not wait until the device has done what it was given before.
    """
    pinned = device.type == "cuda"
    return torch.tensor(numbers, dtype=dtype, pin_memory=pinned).to(device, non_blocking=pinned)
