"""The plain way: torch's operators and transformers' modules, on any device. The others are tested against it."""

import torch

from server.compute.backend import Backend


def unsupported_reason(device: torch.device) -> str | None:
    """It computes anywhere."""
    return None


def make(device: torch.device, dtype: torch.dtype) -> Backend:
    """Its backend."""
    from server.compute.reference.backend import ReferenceBackend

    return ReferenceBackend(device, dtype)
