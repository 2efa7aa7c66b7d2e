"""The C kernels as the tests have them: compiled for every kind of processor that this one can stand in for."""

import shutil
from ctypes import CDLL, c_int64
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


def tile_faults() -> int:
    """How many tile instructions were emulated in this process that a processor would have refused."""
    return sum(c_int64.in_dll(CDLL(str(kernels.path)), "tile_faults").value for kernels in _emulated)


_emulated: list[Kernels] = []


@cache
def _compiled(variant: Variant) -> Kernels:
    kernels = compiled(variant)
    if variant is EMULATED_AMX:
        _emulated.append(kernels)
    return kernels
