"""Imports bitsandbytes' 4-bit layers without downloading code. Use bitsandbytes through this module only.

At its import on processors with AVX512-BF16, bitsandbytes asks the ``kernels`` package for a kernel from a model hub,
and warns if that package is missing. Only installed code may run here.

bitsandbytes also imports torch's compiler, which imports Triton if it is installed: 80 MB of memory, useless without a
GPU. The compiler looks for Triton once, so this module must be imported before others that import it, as transformers.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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
    from bitsandbytes.nn.modules import Linear4bit

__all__ = ["Linear4bit", "functional"]
