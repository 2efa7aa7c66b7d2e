"""Triton in the tests: on the GPU if there is one, else under Triton's interpreter on the CPU."""

import importlib.util
import os

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def triton_unsupported_reason() -> str | None:
    """Why the kernels cannot run here; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "no CUDA device, and TRITON_INTERPRET=1 is not set"
    return None


def need_triton() -> None:
    """Skip the calling module where the kernels cannot run."""
    if reason := triton_unsupported_reason():
        pytest.skip(reason, allow_module_level=True)
