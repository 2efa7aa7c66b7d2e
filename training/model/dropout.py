"""Dropout whose random numbers cost a quarter on CPUs.

torch draws 32 bits from one serial generator for every element there, which for an adapter's inputs takes longer than
the adapter's products. Here 64 random bits serve four elements.
"""

import torch
from torch import Tensor, nn

_VALUES = 2**16
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Dropout(nn.Dropout):
    """``nn.Dropout`` with its rate rounded to 1/65536, on CPUs; elsewhere the same."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or input.device.type != "cpu":
            return super().forward(input)
        kept = kept_bits(self.p, input)
        return input.masked_fill(kept == 0, 0).mul_(kept_scale(self.p))


def kept_bits(p: float, like: Tensor) -> Tensor:
    """What dropout at rate ``p`` leaves of ``like``: all bits set, or none, with a chance of ``p``.

    Integers of the shape and element size of ``like``, for ``and`` to apply. Nothing is scaled: :func:`kept_scale` does
    that.
    """
    count = like.numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64, device=like.device).random_(-(2**63), None)
    kept = bits.view(torch.int16)[:count]
    # Into integers rather than into bool: seven times as fast on a CPU.
    torch.ge(kept, _dropped(p) - _VALUES // 2, out=kept)
    return kept.neg_().view(like.shape).to(_INTEGERS[like.element_size()])


def kept_scale(p: float) -> float:
    """Keeps the mean: what :func:`kept_bits` leaves is to be multiplied by it."""
    return _VALUES / (_VALUES - _dropped(p))


def masked(x: Tensor, kept: Tensor | None) -> Tensor:
    """``x`` where ``kept`` has its bits set, else 0; ``x`` itself where there is no mask."""
    return x if kept is None else (x.view(kept.dtype) & kept).view(x.dtype)


def mask_(x: Tensor, kept: Tensor | None) -> Tensor:
    """The same in place."""
    if kept is not None:
        x.view(kept.dtype).bitwise_and_(kept)
    return x


def _dropped(p: float) -> int:
    """In 65536; never all of them."""
    return min(round(p * _VALUES), _VALUES - 1)
