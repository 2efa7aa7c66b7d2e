"""Double quantisation: stores the scales of 4-bit blocks in 8 bits, with the same bytes on every processor.

The method is QLoRA's (Dettmers et al. 2023, section 3), as bitsandbytes implements it. But bitsandbytes computes two
things with torch that are rounded differently on different processors: the mean of the scales, whose order of summation
depends on vectors and threads, and the table of 256 values, which comes from ``linspace``. Here both are deterministic.
"""

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from bases.nf4 import Linear4bit, functional

BLOCK = 256
"""Number of scales that share a second-level scale."""
_EXPONENTS = 7


def double_quantise(model: PreTrainedModel) -> None:
    """Quantise the scales of every 4-bit layer of ``model`` from float32 to 8 bits.

    Also sets double quantisation in the model's config, as if transformers had done it.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            weight: Any = module.weight
            quantise_scales(weight.quant_state)
            weight.compress_statistics = True
    model.config.quantization_config.bnb_4bit_use_double_quant = True


def quantise_scales(state: functional.QuantState) -> None:
    """Replace the scales of ``state`` (float32, [blocks]) by codes (uint8, [blocks]), an offset and nested scales."""
    scales = state.absmax
    state.offset = torch.tensor(math.fsum(scales.tolist()) / scales.numel(), dtype=torch.float32)
    state.absmax, state.state2 = functional.quantize_blockwise(scales - state.offset, code_table(), blocksize=BLOCK)
    state.nested = True


@cache
def code_table(*, fused: bool = True) -> Tensor:
    """Return the 256 values of the codes, between -1 and 1, float32, ascending (Dettmers et al. 2021).

    With ``fused`` they are bitsandbytes' values on processors with fused multiply-add (x86 with AVX2 or later),
    otherwise those on processors without.
    """
    values = [np.float32(0), np.float32(1)]
    for exponent in range(_EXPONENTS):
        edges = _linspace(0.1, 1, 2**exponent + 1, fused)
        means = np.float32(10.0 ** (exponent - _EXPONENTS + 1)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values += [*means, *-means]
    return torch.from_numpy(np.sort(np.array(values, np.float32)))


def _linspace(first: float, last: float, count: int, fused: bool) -> NDArray[np.float32]:
    """Return ``torch.linspace`` in float32; with ``fused``, products are not rounded before they are added."""
    start, end = np.float32(first), np.float32(last)
    step = (end - start) / np.float32(count - 1)
    # A product of float32 numbers is exact in float64.
    index: NDArray[np.floating[Any]] = np.arange(count, dtype=np.float64 if fused else np.float32)
    up, down = start + step * index, end - step * (count - 1 - index)
    edges: NDArray[np.float32] = np.where(index < count // 2, up, down).astype(np.float32)
    return edges
