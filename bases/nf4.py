"""bitsandbytes' 4-bit layers, imported without fetching code.

On processors with AVX512-BF16 bitsandbytes asks the ``kernels`` package, at import, for a kernel from a model hub, and
warns where that package is missing. What runs here is what was installed: use bitsandbytes through this module.

With it comes torch's compiler, which imports Triton where it is installed: 80 MB of memory that serve nobody without a
GPU. It looks once, so this module must be imported before what else brings the compiler, which transformers does.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType

import torch


@contextmanager
def _as_installed() -> Iterator[None]:
    """No ``kernels`` package, and no warning about its absence; no Triton without a GPU."""
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
    """Importing ``package`` raises ImportError."""
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
