"""4-bit linear layers over one input as one matrix, for fused kernels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bases.nf4 import functional
from server.compute.cpu.kernels import Kernels
from server.compute.cpu.memory import huge_pages
from server.compute.cpu.structures import NF4_BLOCK, NF4_OUTPUTS, Nf4, address


class FusedNf4:
    """NF4 layers over one input as one matrix in the layout of bitsandbytes' fused CPU kernel.

    The weights are [out, in / 2] bytes, packed for 32 outputs at a time, and the scales [in / blocksize, out] bf16
    (read in ``bitsandbytes/functional.py`` 0.50), so matrices join along ``out`` without touching a value. Our
    own kernel reads the same layout; :meth:`reference` is bitsandbytes', for CPUs with AVX512-BF16.
    """

    def __init__(self, layers: Sequence[Any], kernels: Kernels | None) -> None:
        """``layers`` have to be of a kind it :meth:`takes`. ``kernels``: ours, where they compute these layers."""
        packed = [
            functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state) for layer in layers
        ]
        self.outs = [weight.shape[0] for weight, _ in packed]
        self.shape = [sum(self.outs), packed[0][1].shape[1]]
        self.weight = huge_pages().copy(torch.cat([weight for weight, _ in packed]))
        self.absmax = huge_pages().copy(torch.cat([state.absmax for _, state in packed], dim=1))
        self.code = packed[0][1].code.clone()  # not a view of the checkpoint, which would stay in memory for it
        self.blocksize = packed[0][1].blocksize
        biases = [layer.bias for layer in layers]
        self.bias = (
            None
            if all(bias is None for bias in biases)
            else torch.cat(
                [
                    torch.zeros(out, dtype=torch.bfloat16) if bias is None else bias.data.to(torch.bfloat16)
                    for bias, out in zip(biases, self.outs, strict=True)
                ]
            )
        )
        addresses = (address(tensor) for tensor in (self.weight, self.absmax, self.bias))
        self.native = Nf4(self.shape[0], self.shape[1], *addresses)
        self.kernels = kernels
        for layer in layers:
            layer.weight = None

    @staticmethod
    def takes(layer: Any, *, ours: bool) -> bool:
        """Whether ``ours``, or else bitsandbytes' kernel, computes a 4-bit layer of this shape."""
        state = layer.weight.quant_state
        return (
            (state.blocksize == NF4_BLOCK if ours else functional.has_avx512bf16())
            and state.quant_type == "nf4"
            and state.shape[0] % NF4_OUTPUTS == 0
            and state.shape[1] % state.blocksize == 0
            and not getattr(state, "packing_format_for_cpu", False)
        )

    def __call__(self, x: Tensor) -> list[Tensor]:
        """[rows, in] -> [rows, out] per layer, views of one tensor."""
        ours = self.kernels if x.dtype == torch.bfloat16 else None
        y = ours.nf4_matmul(x, self.native) if ours else self.reference(x)
        return list(y.split(self.outs, dim=-1))

    def reference(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out] of all layers side by side, by bitsandbytes' kernel."""
        y: Tensor = torch.ops.bitsandbytes.gemv_4bit(x, self.weight, self.shape, self.absmax, self.code, self.blocksize)
        return y if self.bias is None else y + self.bias


def detach_from_checkpoint(model: nn.Module) -> None:
    """Copy what is left of a model whose linear layers are all :class:`FusedNf4`, and let go of the file it came from.

    Parameters are views of that file in memory, which stays whole, 4-bit weights included, as long as one of them does.
    What is read in every step, the output layer, lies in huge pages afterwards.
    """
    for parameter in model.parameters():
        parameter.data = huge_pages().copy(parameter.data)
