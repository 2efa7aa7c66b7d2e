"""The reference backend: torch's operators and transformers' modules, on any device. Others are tested against it."""

import torch

from server.compute.backend import Backend


def unsupported_reason(device: torch.device) -> str | None:
    """None: it computes on every device."""
    return None


def make(device: torch.device, dtype: torch.dtype, cpu: str = "auto") -> Backend:
    """The backend for ``device``, with activations, keys and values of ``dtype``; it has no kernels to choose from."""
    from server.compute.reference.backend import ReferenceBackend

    return ReferenceBackend(device, dtype)
