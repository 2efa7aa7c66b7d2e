"""Copies of small arrays from the host to the device."""

from typing import Any

import torch
from torch import Tensor


def to_device(numbers: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """``numbers``, anything that ``torch.tensor`` takes, as a tensor on ``device``.

    To CUDA the copy starts from pinned memory, so that the host does not wait for the work queued on the device.
    """
    pinned = device.type == "cuda"
    return torch.tensor(numbers, dtype=dtype, pin_memory=pinned).to(device, non_blocking=pinned)
