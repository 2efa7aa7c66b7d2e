"""The CUDA backend: Triton kernels for LoRA, paged attention and the small operations of Llama layers, decode steps as
CUDA graphs, adapter copies in the background.

Triton's interpreter (``TRITON_INTERPRET=1``, set before Triton is first imported) runs the same kernels on a CPU.
"""

import importlib.util
import logging

import torch

from server.compute.backend import Backend

log = logging.getLogger(__name__)


def unsupported_reason(device: torch.device) -> str | None:
    """Why this backend cannot compute on ``device``. If only Triton is missing, logs a warning, too."""
    if device.type != "cuda":
        return "it computes on CUDA devices only"
    if importlib.util.find_spec("triton") is None:
        log.warning(
            "Triton is not installed: LoRA and attention run as plain torch operators, and steps wait while adapters "
            "are copied to the device, which is slower. Install triton to change that."
        )
        return "Triton is not installed"
    return None


def make(device: torch.device, dtype: torch.dtype, cpu: str = "auto") -> Backend:
    """The backend for ``device``, with activations, keys and values of ``dtype``; it has no kernels to choose from."""
    from server.compute.cuda.backend import CudaBackend
    from server.compute.cuda.decode import CudaGraphs

    return CudaBackend(device, dtype, CudaGraphs())
