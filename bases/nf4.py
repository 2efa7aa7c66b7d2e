"""Imports bitsandbytes' 4-bit layers without downloading code, and mends one function. Use it through this module only.

At its import on processors with AVX512-BF16, bitsandbytes asks the ``kernels`` package for a kernel from a model hub,
and warns if that package is missing. Only installed code may run here.

bitsandbytes also imports torch's compiler, which imports Triton if it is installed: 80 MB of memory, useless without a
GPU. The compiler looks for Triton once, so this module must be imported before others that import it, as transformers.

On processors with AVX-512, bitsandbytes 0.50 dequantises wrongly where rows are multiples of 16 weights and not of a
block, 64: it takes scales as if every row began with a block of its own. Blocks are cut from the whole matrix, which
is therefore given to the C functions as one row: all of bitsandbytes calls them, its layers' forward and backward too.
"""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from ctypes import c_longlong, c_void_p
from types import ModuleType

import torch


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
    from bitsandbytes.cextension import lib
    from bitsandbytes.nn.modules import Linear4bit


def _in_one_row(dequantize: Callable[..., None]) -> Callable[..., None]:
    """The C function, given a matrix as one row where its rows are not whole blocks."""

    def dequantize_in_one_row(
        packed: c_void_p, absmax: c_void_p, out: c_void_p, blocksize: c_longlong, rows: c_longlong, columns: c_longlong
    ) -> None:
        if columns.value % blocksize.value:
            rows, columns = c_longlong(1), c_longlong(rows.value * columns.value)
        dequantize(packed, absmax, out, blocksize, rows, columns)

    return dequantize_in_one_row


for _name in ("nf4_fp32", "nf4_bf16", "nf4_fp16", "fp4_fp32", "fp4_bf16", "fp4_fp16"):
    _function = f"cdequantize_blockwise_cpu_{_name}"
    setattr(lib, _function, _in_one_row(getattr(lib, _function)))

__all__ = ["Linear4bit", "functional"]
