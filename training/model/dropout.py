"""Dropout that needs a quarter of the random bits on CPUs.

There torch draws 32 bits for every element, from one serial generator, which takes longer than an adapter's matrix
products do. Here 64 random bits serve four elements.
"""

import torch
from torch import Tensor, nn

_VALUES = 2**16
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Dropout(nn.Dropout):
    """``nn.Dropout``, with its rate rounded to 1/65536 on CPUs."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or input.device.type != "cpu":
            return super().forward(input)
        kept = dropout_mask(self.p, input)
        return input.masked_fill(kept == 0, 0).mul_(dropout_scale(self.p))


def dropout_mask(p: float, like: Tensor) -> Tensor:
    """Return a random dropout mask: integers of the shape and element size of ``like``.

    Each is 0 with probability ``p``, else has all bits set, so that a bitwise ``and`` applies it. It does not scale:
    multiply by :func:`dropout_scale` for that.
    """
    count = like.numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64, device=like.device).random_(-(2**63), None)
    kept = bits.view(torch.int16)[:count]
    # Into integers rather than into bool: seven times as fast on a CPU.
    torch.ge(kept, _dropped(p) - _VALUES // 2, out=kept)
    return kept.neg_().view(like.shape).to(_INTEGERS[like.element_size()])


def dropout_scale(p: float) -> float:
    """Return the factor to multiply masked values by, which keeps their mean."""
    return _VALUES / (_VALUES - _dropped(p))


def apply_mask(x: Tensor, kept: Tensor | None) -> Tensor:
    """Return ``x`` with 0 where the mask ``kept`` is 0; ``x`` itself if the mask is None."""
    return x if kept is None else (x.view(kept.dtype) & kept).view(x.dtype)


def apply_mask_(x: Tensor, kept: Tensor | None) -> Tensor:
    """Apply a mask in place, as :func:`apply_mask` does."""
    if kept is not None:
        x.view(kept.dtype).bitwise_and_(kept)
    return x


def _dropped(p: float) -> int:
    """Return how many of 65536 values are dropped at rate ``p``; never all of them."""
    return min(round(p * _VALUES), _VALUES - 1)
