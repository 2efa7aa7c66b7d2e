"""The CPU backend: C kernels, compiled for this kind of processor by the machine's own compiler when first needed.

They are optional, part by part: where a compiler is missing, or a shape is not what they take, bitsandbytes' fused
4-bit kernel and the reference serve. Called through ctypes, which lets go of the interpreter lock.
"""

import torch

from server.compute.backend import Backend


def unsupported_reason(device: torch.device) -> str | None:
    """Why it cannot compute on ``device``."""
    return None if device.type == "cpu" else "it computes on CPUs only"


def make(device: torch.device, dtype: torch.dtype, cpu: str = "auto") -> Backend:
    """The backend, with activations, keys and values of ``dtype``, and the kernels that ``cpu`` names."""
    from server.compute.cpu.backend import CpuBackend
    from server.compute.cpu.selection import select_kernels

    return CpuBackend(device, dtype, select_kernels(cpu).kernels)
