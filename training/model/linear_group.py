"""Computes adapted linear layers in groups that share an input, with a hand-written backward pass.

PEFT's forward is the reference: it adds ``scale * dropout(x) A^T B^T`` to the base layer's output, in float32 and with
some twenty small operations per layer, which on a CPU take longer than the matrix products. Here everything is computed
in the base's dtype, as under autocast; A, B, their gradients and the optimizer state stay float32.

The layers of a group share one dropout mask, whereas PEFT draws one per layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bases.architecture import SharedInputCache
from training.model.dropout import apply_mask, apply_mask_, dropout_mask, dropout_scale

Weight = Callable[[], Tensor]
"""Returns a base layer's weight [out, in], in the dtype to compute in."""


@dataclass(frozen=True)
class AdaptedLinear:
    """One of PEFT's layers and its weights."""

    layer: Any
    """PEFT's layer, with one plain adapter."""
    weight: Weight
    dtype: torch.dtype
    """Dtype of the weight and of the computation."""
    bias: Tensor | None
    down: Tensor
    """A: float32 [rank, in]."""
    up: Tensor
    """B: float32 [out, rank]."""
    scale: float


class LinearGroup:
    """Layers of one module with the same input: the first one called computes the outputs of all."""

    def __init__(self, members: Sequence[AdaptedLinear], dropout: float) -> None:
        self.members = members
        self._dropout = dropout
        self._outputs = SharedInputCache()

    def forward_of(self, number: int) -> Callable[..., Tensor]:
        """Return the forward of one member, [..., in] -> [..., out]; PEFT's own while its adapter is disabled."""
        layer = self.members[number].layer

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if args or kwargs or layer.disable_adapters or layer.merged:
                own: Tensor = type(layer).forward(layer, x, *args, **kwargs)
                return own
            return self._outputs.take(number, x, self.compute)

        return forward

    def compute(self, given: Tensor) -> tuple[Tensor, ...]:
        """Return every member's output [..., out] for ``given`` [..., in], in the dtype of ``given``."""
        x = given.to(self.members[0].dtype)
        training = self._dropout and self.members[0].layer.training
        kept = dropout_mask(self._dropout, x) if training else None
        scale = dropout_scale(self._dropout) if training else 1.0
        factors = [factor for member in self.members for factor in (member.down, member.up)]
        outputs = _LoraLinearFunction.apply(x, kept, scale, self.members, *factors)
        return tuple(output.to(given.dtype) for output in outputs)


class _LoraLinearFunction(torch.autograd.Function):
    """(x, dropout mask or None, dropout scale, members, A, B, A, B, ...) -> each member's output."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kept: Tensor | None,
        dropout_scale: float,
        members: Sequence[AdaptedLinear],
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.members, ctx.scales = members, [member.scale * dropout_scale for member in members]
        flat = x.reshape(-1, x.shape[-1])
        bits = None if kept is None else kept.view_as(flat)
        downs = torch.cat(factors[::2]).to(x.dtype)
        ups = [(up * scale).to(x.dtype) for up, scale in zip(factors[1::2], ctx.scales, strict=True)]
        hidden = torch.mm(apply_mask(flat, bits), downs.t())
        outputs = []
        for member, up, part in zip(members, ups, hidden.split(_ranks(members), 1), strict=True):
            output = _base_product(member, flat).addmm_(part, up.t())
            outputs.append(output.view(*x.shape[:-1], -1))
        ctx.save_for_backward(flat, bits, downs, hidden, *ups)
        return tuple(outputs)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        flat, bits, downs, hidden, *ups = ctx.saved_tensors
        of_hidden = torch.empty_like(hidden)
        ranks = _ranks(ctx.members)
        grouped = zip(ctx.members, ups, ctx.scales, hidden.split(ranks, 1), of_hidden.split(ranks, 1), strict=True)
        flattened = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
        of_ups = []
        for (member, up, scale, part, of_part), rows in zip(grouped, flattened, strict=True):
            torch.mm(rows, up, out=of_part)
            of_ups.append(torch.mm(rows.t(), part).to(member.up.dtype).mul_(scale))
        of_downs = torch.mm(of_hidden.t(), apply_mask(flat, bits)).to(ctx.members[0].down.dtype).split(ranks)
        of_x: Tensor | None = None
        if ctx.needs_input_grad[0]:
            of_x = apply_mask_(torch.mm(of_hidden, downs), bits)
            for member, rows in zip(ctx.members, flattened, strict=True):
                of_x.addmm_(rows, member.weight())
            of_x = of_x.view(*gradients[0].shape[:-1], -1)
        factors = [factor for pair in zip(of_downs, of_ups, strict=True) for factor in pair]
        return of_x, None, None, None, *factors


def _ranks(members: Sequence[AdaptedLinear]) -> list[int]:
    return [member.down.shape[0] for member in members]


def _base_product(member: AdaptedLinear, x: Tensor) -> Tensor:
    weight = member.weight().t()
    return torch.mm(x, weight) if member.bias is None else torch.addmm(member.bias, x, weight)
