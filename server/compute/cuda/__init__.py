"""What CUDA devices run besides torch's own operators: Triton kernels for LoRA, paged attention and what lies between a
Llama's matrix products, decode steps as CUDA graphs, adapter copies on a stream of their own.

Triton's interpreter (``TRITON_INTERPRET=1``, set before Triton is first imported) runs the same kernels on a CPU.
"""

import importlib.util
import logging

import torch

from server.compute.backend import Backend

log = logging.getLogger(__name__)


def unsupported_reason(device: torch.device) -> str | None:
    """Why it cannot compute on ``device``; where only Triton is missing, that is a warning in the log, too."""
    if device.type != "cuda":
        return "it is for CUDA devices"
    if importlib.util.find_spec("triton") is None:
        log.warning(
            "Triton is not installed: LoRA and attention run as plain torch operators, and adapters are copied to the "
            "device between steps, which is slower."
        )
        return "Triton is not installed"
    return None


def make(device: torch.device, dtype: torch.dtype) -> Backend:
    """Its backend."""
    from server.compute.cuda.backend import CudaBackend
    from server.compute.cuda.decode import CudaGraphs

    return CudaBackend(device, dtype, CudaGraphs())
