"""The C kernels as the tests have them: compiled for every kind of processor that this one can stand in for."""

import shutil
from functools import cache

import pytest

from server.compute.cpu.kernels import Kernels
from server.compute.cpu.selection import compiled
from server.compute.cpu.variants import EMULATED_AMX, VARIANTS, Variant


def runnable() -> list[Kernels]:
    """The kernels of every variant that this processor runs."""
    require_compiler()
    return [_compiled(variant) for variant in (*VARIANTS, EMULATED_AMX) if not variant.lacking()]


def kernels_of(variant: Variant) -> Kernels:
    """The kernels of ``variant``; skips the test where this processor does not run them."""
    require_compiler()
    if missing := variant.lacking():
        pytest.skip(f"this processor has no {', '.join(missing)}")
    return _compiled(variant)


def require_compiler() -> None:
    """Skip the test where nothing can compile the kernels."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")


_compiled = cache(compiled)
