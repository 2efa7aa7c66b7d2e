"""Imports bitsandbytes' 4-bit layers without downloading code, and mends one function. Use it through this module only.

At its import on processors with AVX512-BF16, bitsandbytes asks the ``kernels`` package for a kernel from a model hub,
and warns if that package is missing. Only installed code may run here.

bitsandbytes also imports torch's compiler, which imports Triton if it is installed: 80 MB of memory, useless without a
GPU. The compiler looks for Triton once, so this module must be imported before others that import it, as transformers.

On processors with AVX-512, ``dequantize_4bit`` of bitsandbytes 0.50 gives wrong weights where rows are multiples of 16
weights and not of a block, 64: it takes scales as if every row began with a block of its own. Blocks are cut from the
whole matrix, which is therefore given to it as one row.
"""

import copy
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


@contextmanager
def _as_installed() -> Iterator[None]:
    """Hide the ``kernels`` package, without the warning about it, and Triton if there is no GPU."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with _hidden("kernels"), nullcontext() if torch.cuda.is_available() else _hidden("triton"):
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Make importing ``package`` raise ImportError."""
    present: ModuleType | None = sys.modules.get(package)
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]
        if present is not None:
            sys.modules[package] = present


with _as_installed():
    from bitsandbytes import functional
    from bitsandbytes.nn.modules import Linear4bit


def _in_one_row(dequantize: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``dequantize_4bit`` for matrices on the CPU whose rows are not whole blocks."""

    @wraps(dequantize)
    def dequantize_in_one_row(packed: Tensor, quant_state: Any = None, *args: Any, **options: Any) -> Tensor:
        state = quant_state
        whole = state is None or len(state.shape) != 2 or state.shape[1] % state.blocksize == 0
        if whole or packed.device.type != "cpu" or packed.shape[0] == 1 or args or options:
            return dequantize(packed, quant_state, *args, **options)
        flat = copy.copy(state)
        flat.shape = torch.Size((1, state.shape.numel()))
        return dequantize(packed, flat).view(state.shape)

    return dequantize_in_one_row


functional.dequantize_4bit = _in_one_row(functional.dequantize_4bit)

__all__ = ["Linear4bit", "functional"]
