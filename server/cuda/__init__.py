"""What CUDA devices run besides torch's own operators: Triton kernels for LoRA, paged attention and what lies between a
Llama's matrix products, decode steps as CUDA graphs, adapter copies on a stream of their own.

They are optional: each has a plain path beside it that serves where Triton is missing, and a numeric test between the
two. Triton's interpreter (``TRITON_INTERPRET=1``, set before Triton is first imported) runs the same kernels on a CPU.
"""

import importlib.util
import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)


def available(device: torch.device) -> bool:
    """Whether the kernels serve ``device``; where only Triton is missing, that is said in the log."""
    return device.type == "cuda" and _has_triton()


def send(numbers: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """``numbers``, whatever ``torch.tensor`` takes, on ``device``.

    To CUDA from pinned memory, so that the host does not wait until the device has done what it was given before.
    """
    pinned = device.type == "cuda"
    return torch.tensor(numbers, dtype=dtype, pin_memory=pinned).to(device, non_blocking=pinned)


@cache
def _has_triton() -> bool:
    if importlib.util.find_spec("triton") is None:
        log.warning("Triton is not installed: LoRA and attention run as plain torch operators, which are slower.")
        return False
    return True
