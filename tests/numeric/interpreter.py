"""Where Triton's kernels run in these tests: on the GPU if there is one, else under Triton's interpreter on the CPU."""

import importlib.util
import os

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def need_triton() -> None:
    """Skip the calling module where the kernels cannot run."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed", allow_module_level=True)
    if DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no CUDA device, and TRITON_INTERPRET=1 is not set", allow_module_level=True)
