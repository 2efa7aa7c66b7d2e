"""4-bit linear layers over one input as one matrix, for fused kernels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bases.nf4 import functional
from server.compute.cpu.kernels import Kernels
from server.compute.cpu.memory import huge_pages
from server.compute.cpu.packing import PackedNf4, row_stride
from server.compute.cpu.structures import NF4_BLOCK, NF4_OUTPUTS, Nf4, address


class FusedNf4:
    """NF4 layers over one input as one matrix, :class:`~server.compute.cpu.packing.PackedNf4`.

    Our own kernel reads it, whatever the layers' shapes; :meth:`reference` is bitsandbytes' kernel, for CPUs with
    AVX512-BF16, whole blocks of inputs and multiples of 32 outputs.
    """

    def __init__(self, layers: Sequence[Any], kernels: Kernels | None) -> None:
        """``layers`` have to be of a kind it :meth:`takes`. ``kernels``: ours, where they compute these layers."""
        states = [layer.weight.quant_state for layer in layers]
        self.outs = [state.shape[0] for state in states]
        self.shape = [sum(self.outs), states[0].shape[1]]
        self.code = states[0].code.clone()  # not a view of the checkpoint, which would stay in memory for it
        self.blocksize = states[0].blocksize
        packed = PackedNf4.of(layers)
        self.weight, self.absmax = huge_pages().copy(packed.weight), huge_pages().copy(packed.scales)
        self.place, self.shift = packed.place, packed.shift
        self.bias = _bias(layers)
        padded_bias = self.bias
        if self.bias is not None and self.place is not None:
            padded_bias = torch.where(self.place >= 0, self.bias[self.place.clamp(min=0)], 0)
        self._padded_bias = padded_bias
        blocks, outputs = self.absmax.shape
        addresses = (address(part) for part in (self.weight, self.absmax, padded_bias, self.place, self.shift))
        stride = row_stride(self.shape[1], blocks)
        self.native = Nf4(*self.shape, outputs // NF4_OUTPUTS, blocks, stride, *addresses)
        self.kernels = kernels
        for layer in layers:
            layer.weight = None

    @staticmethod
    def takes(layer: Any, *, ours: bool) -> bool:
        """Whether ``ours``, or else bitsandbytes' kernel, computes a 4-bit layer of this kind."""
        state = layer.weight.quant_state
        if state.quant_type != "nf4" or getattr(state, "packing_format_for_cpu", False):
            return False
        if ours:
            return bool(state.blocksize == NF4_BLOCK)
        whole = state.shape[0] % NF4_OUTPUTS == 0 and state.shape[1] % state.blocksize == 0
        return whole and bool(functional.has_avx512bf16())

    def __call__(self, x: Tensor) -> list[Tensor]:
        """[rows, in] -> [rows, out] per layer, views of one tensor."""
        if self.kernels and (x.dtype == torch.bfloat16 or self.place is not None):
            y = self.kernels.nf4_matmul(x.to(torch.bfloat16), self.native).to(x.dtype)
        else:
            y = self.reference(x)
        return list(y.split(self.outs, dim=-1))

    def reference(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out] of all layers side by side, by bitsandbytes' kernel."""
        y: Tensor = torch.ops.bitsandbytes.gemv_4bit(x, self.weight, self.shape, self.absmax, self.code, self.blocksize)
        return y if self.bias is None else y + self.bias


def _bias(layers: Sequence[Any]) -> Tensor | None:
    """The layers' biases side by side [out] bf16, zeros where a layer has none; None if no layer has one."""
    if all(layer.bias is None for layer in layers):
        return None
    biases = (
        torch.zeros(layer.weight.quant_state.shape[0]) if layer.bias is None else layer.bias.data for layer in layers
    )
    return torch.cat([bias.to(torch.bfloat16) for bias in biases])


def detach_from_checkpoint(model: nn.Module) -> None:
    """Copy what is left of a model whose linear layers are all :class:`FusedNf4`, and let go of the file it came from.

    Parameters are views of that file in memory, which stays whole, 4-bit weights included, as long as one of them does.
    What is read in every step, the output layer, lies in huge pages afterwards.
    """
    for parameter in model.parameters():
        parameter.data = huge_pages().copy(parameter.data)
