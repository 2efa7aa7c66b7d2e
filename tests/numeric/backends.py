"""Backends in the tests: each on a device that it can use here; Triton under its interpreter without a GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bases.nf4 import Linear4bit, functional
from server.compute import cuda
from server.compute.backend import Backend
from tests.numeric.interpreter import DEVICE, triton_unsupported_reason

BF16 = torch.bfloat16
CPU = torch.device("cpu")
ODD_SHAPES = [(64, (50,)), (72, (72, 24, 24)), (96, (33,)), (100, (1000,)), (968, (40, 100)), (61, (7, 50))]
"""Inputs, and the outputs of the layers that share them, of which the NF4 kernel's blocks are no even parts."""


def on_test_device(module: Any, dtype: torch.dtype) -> Backend:
    """The backend of ``module``, a folder of ``server/compute``. Skips the test if it cannot run here."""
    if module is cuda:
        if reason := triton_unsupported_reason():
            pytest.skip(reason)
        from server.compute.cuda.backend import CudaBackend

        return CudaBackend(DEVICE, dtype, lambda step: step)
    reason = module.unsupported_reason(CPU)
    if reason:
        pytest.skip(reason)
    backend: Backend = module.make(CPU, dtype)
    return backend


def nf4_layer(inputs: int, outputs: int, *, bias: bool = False) -> tuple[Linear4bit, Tensor]:
    """A quantised layer, and its weights dequantised to float32."""
    layer = Linear4bit(inputs, outputs, bias=bias, compute_dtype=BF16, quant_type="nf4")
    layer.weight.data = torch.randn(outputs, inputs, dtype=BF16) * 0.05
    if bias:
        layer.bias = nn.Parameter(torch.randn(outputs, dtype=BF16))
    layer = layer.to("cpu").eval().requires_grad_(requires_grad=False)
    return layer, functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
