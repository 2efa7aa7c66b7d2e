"""Dropout whose random numbers cost a quarter on CPUs.

torch draws 32 bits from one serial generator for every element there, which for an adapter's inputs takes longer than
the adapter's products. Here 64 random bits serve four elements.
"""

import torch
from torch import Tensor, nn

_VALUES = 2**16


class Dropout(nn.Dropout):
    """``nn.Dropout`` with its rate rounded to 1/65536, on CPUs; elsewhere the same."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or input.device.type != "cpu":
            return super().forward(input)
        dropped = round(self.p * _VALUES)
        return input.masked_fill(_below(dropped, input.shape), 0).mul_(_VALUES / (_VALUES - dropped))


def _below(threshold: int, shape: torch.Size) -> Tensor:
    """bool, true with a chance of ``threshold`` in 65536."""
    count = shape.numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    return (bits.view(torch.int16)[:count] < threshold - _VALUES // 2).view(shape)
