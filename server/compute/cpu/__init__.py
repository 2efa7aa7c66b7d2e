"""C kernels for CPUs with AMX, compiled by the machine's own compiler when they are first needed.

They are optional, part by part: where the processor, a compiler or a shape is not what they take, bitsandbytes' fused
4-bit kernel and the reference serve. Called through ctypes, which lets go of the interpreter lock.
"""

import torch

from server.compute.backend import Backend


def unsupported_reason(device: torch.device) -> str | None:
    """Why it cannot compute on ``device``."""
    return None if device.type == "cpu" else "it is for CPUs"


def make(device: torch.device, dtype: torch.dtype) -> Backend:
    """Its backend."""
    from server.compute.cpu.backend import CpuBackend

    return CpuBackend(device, dtype)
