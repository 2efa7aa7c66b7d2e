"""Double quantisation: the scales of 4-bit blocks in 8 bits, to the same bytes on every processor.

It is QLoRA's (Dettmers et al. 2023, section 3), as bitsandbytes computes it. But bitsandbytes takes two things from
torch that are rounded otherwise on other processors: the mean of the scales, a sum in the order of vectors and threads,
and the table of 256 values, which comes from ``linspace``. Here both are computed in one way.
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
"""Scales that share a scale of their own."""
_EXPONENTS = 7


def double_quantise(model: PreTrainedModel) -> None:
    """Bring the scales of every 4-bit layer of ``model``, in float32 so far, into 8 bits.

    Its config then says so too, as if transformers had been asked for double quantisation.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            weight: Any = module.weight
            quantise_scales(weight.quant_state)
            weight.compress_statistics = True
    model.config.quantization_config.bnb_4bit_use_double_quant = True


def quantise_scales(state: functional.QuantState) -> None:
    """Replace ``state``'s scales (float32, [blocks]) by codes (uint8, [blocks]) with what it takes to undo that."""
    scales = state.absmax
    state.offset = torch.tensor(math.fsum(scales.tolist()) / scales.numel(), dtype=torch.float32)
    state.absmax, state.state2 = functional.quantize_blockwise(scales - state.offset, code_table(), blocksize=BLOCK)
    state.nested = True


@cache
def code_table(*, fused: bool = True) -> Tensor:
    """The 256 values between -1 and 1 that a code stands for, float32, ascending (Dettmers et al. 2021).

    ``fused`` gives bitsandbytes' table as it comes out with fused multiply-add (x86 with AVX2 or more); False, as it
    comes out without.
    """
    values = [np.float32(0), np.float32(1)]
    for exponent in range(_EXPONENTS):
        edges = _linspace(0.1, 1, 2**exponent + 1, fused)
        means = np.float32(10.0 ** (exponent - _EXPONENTS + 1)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values += [*means, *-means]
    return torch.from_numpy(np.sort(np.array(values, np.float32)))


def _linspace(first: float, last: float, count: int, fused: bool) -> NDArray[np.float32]:
    """``torch.linspace`` in float32, with its products rounded before they are added or not."""
    start, end = np.float32(first), np.float32(last)
    step = (end - start) / np.float32(count - 1)
    # A product of float32 numbers is exact in float64.
    index: NDArray[np.floating[Any]] = np.arange(count, dtype=np.float64 if fused else np.float32)
    up, down = start + step * index, end - step * (count - 1 - index)
    edges: NDArray[np.float32] = np.where(index < count // 2, up, down).astype(np.float32)
    return edges
