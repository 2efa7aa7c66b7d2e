"""NF4 layers over one input as one matrix, in the layout that the kernels read."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from bases.nf4 import functional
from server.compute.cpu.structures import NF4_BLOCK, NF4_OUTPUTS

ZERO = 7
"""The code of 0."""


@dataclass(frozen=True)
class PackedNf4:
    """The weights of layers over one input, side by side.

    They are packed for 32 outputs and a pair of inputs at a time, as bitsandbytes' kernel for CPUs reads them, too:
    ``nf4.c`` shows the order. It also says what happens to a row that does not begin where a block does: it is packed
    with zeros before it, next to others of which that many inputs are missing.
    """

    weight: Tensor
    """[outputs, inputs / 2] uint8, both padded."""
    scales: Tensor
    """[blocks, outputs] bf16."""
    place: Tensor | None
    """[outputs] int32: which output of the layers it is, -1 for padding. None: they are in order, without padding."""
    shift: Tensor | None
    """[outputs / 32] int32: zeros before the rows of these outputs. None with ``place``."""

    @classmethod
    def of(cls, layers: Sequence[Any]) -> Self:
        """Of 4-bit layers with the same number of inputs and the same size of blocks."""
        block, inputs = layers[0].weight.quant_state.blocksize, layers[0].weight.quant_state.shape[1]
        outs = [layer.weight.quant_state.shape[0] for layer in layers]
        order = _Order.of(outs, inputs, block)
        codes, scales = zip(*(_unpacked(layer) for layer in layers), strict=True)
        starts = list(accumulate((len(scale) for scale in scales), initial=0))
        first = torch.cat([torch.arange(out) * inputs // block + at for out, at in zip(outs, starts, strict=False)])
        weight = order.arrange(torch.cat(codes))
        return cls(_pack(weight), order.scales(torch.cat(scales), first, block), order.place, order.shift)


@dataclass(frozen=True)
class _Order:
    """In which order outputs are packed, and with how many zeros before their inputs."""

    inputs: int
    blocks: int
    width: int
    """Inputs, padded."""
    sources: Tensor
    """[packed outputs] int64: which output of the layers, -1 for padding."""
    shifts: Tensor
    """[packed outputs] int64."""
    ordered: bool

    @classmethod
    def of(cls, outs: Sequence[int], inputs: int, block: int) -> Self:
        shifts = torch.cat([torch.arange(out) * inputs % block for out in outs])
        sources, padded = [], []
        for shift in shifts.unique().tolist():
            rows = (shifts == shift).nonzero().flatten()
            sources.append(F.pad(rows, (0, -len(rows) % NF4_OUTPUTS), value=-1))
            padded.append(torch.full_like(sources[-1], shift))
        blocks = -(-(inputs + int(shifts.max())) // block)
        source = torch.cat(sources)
        ordered = len(source) == sum(outs) and inputs % block == 0
        return cls(inputs, blocks, blocks * block, source, torch.cat(padded), ordered)

    @property
    def place(self) -> Tensor | None:
        return None if self.ordered else self.sources.to(torch.int32)

    @property
    def shift(self) -> Tensor | None:
        return None if self.ordered else self.shifts[::NF4_OUTPUTS].to(torch.int32).contiguous()

    def arrange(self, codes: Tensor) -> Tensor:
        """[outputs, inputs] -> [packed outputs, packed inputs]."""
        if self.ordered:
            return codes
        arranged = torch.full((len(self.sources), self.width), ZERO, dtype=torch.uint8)
        for shift in self.shifts.unique().tolist():
            rows = ((self.shifts == shift) & (self.sources >= 0)).nonzero().flatten()
            arranged[rows, shift : shift + self.inputs] = codes[self.sources[rows]]
        return arranged

    def scales(self, scales: Tensor, first: Tensor, block: int) -> Tensor:
        """[blocks of the layers], and where each output's begin -> [packed blocks, packed outputs] bf16."""
        if self.ordered:
            return scales.view(-1, self.blocks).T.to(torch.bfloat16).contiguous()
        number = torch.arange(self.blocks)
        at = first[self.sources].unsqueeze(1) + number
        there = (self.sources >= 0).unsqueeze(1) & (number * block < (self.shifts + self.inputs).unsqueeze(1))
        return torch.where(there, scales[at.clamp(max=len(scales) - 1)], 0).T.to(torch.bfloat16).contiguous()


def _unpacked(layer: Any) -> tuple[Tensor, Tensor]:
    """A layer's codes [out, in] uint8, and its scales [blocks] float32. Blocks are cut from all of it in one piece."""
    state = layer.weight.quant_state
    packed = layer.weight.data.view(torch.uint8).reshape(-1)
    codes = torch.stack((packed >> 4, packed & 15), 1).reshape(-1)[: state.shape.numel()].view(state.shape)
    scales = state.absmax
    if state.nested:
        scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
    return codes, scales.float()


def _pack(codes: Tensor) -> Tensor:
    """[outputs, inputs] -> [outputs, inputs / 2]: two outputs 16 apart in a byte."""
    outputs, inputs = codes.shape
    halves = codes.view(outputs // NF4_OUTPUTS, 2, NF4_OUTPUTS // 2, inputs // 2, 2).permute(1, 0, 3, 2, 4)
    return (halves[1] << 4 | halves[0]).reshape(outputs, inputs // 2)


def row_stride(inputs: int, blocks: int) -> int:
    """From one row of a layer's input to the next: so many zeros follow its inputs that rows may be read shifted."""
    return inputs if inputs % NF4_BLOCK == 0 else (blocks + 1) * NF4_BLOCK
