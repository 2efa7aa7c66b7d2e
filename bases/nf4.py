"""bitsandbytes' 4-bit layers, imported without fetching code.

On processors with AVX512-BF16 bitsandbytes asks the ``kernels`` package, at import, for a kernel from a model hub, and
warns where that package is missing. What runs here is what was installed: use bitsandbytes through this module.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def _as_installed() -> Iterator[None]:
    """No ``kernels`` package, and no warning about its absence."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    present: ModuleType | None = sys.modules.get("kernels")
    logger.setLevel(logging.ERROR)
    sys.modules["kernels"] = None  # type: ignore[assignment]  # makes the import raise ImportError
    try:
        yield
    finally:
        del sys.modules["kernels"]
        if present is not None:
            sys.modules["kernels"] = present
        logger.setLevel(level)


with _as_installed():
    from bitsandbytes import functional
    from bitsandbytes.nn.modules import Linear4bit

__all__ = ["Linear4bit", "functional"]
