"""Memory in huge pages for what every step reads from end to end.

Weights and contexts are read once a step at the speed of memory, and the processor's prefetchers stop at the end of
each page: with 4 KiB the kernels here read 27 GB/s on two cores, with 2 MiB and hints of their own up to 36. Where the
system has no huge pages to give, it gives others.
"""

import ctypes
import mmap
from contextlib import suppress
from functools import cache
from math import prod

import torch
from torch import Tensor

HUGE = 2 * 2**20
LINE = 64
CHUNK = 64 * 2**20


class HugePages:
    """Tensors side by side in huge pages. What it has handed out is kept as long as one tensor of a chunk lives.

    For one thread at a time: models are loaded, and adapters placed, by one.
    """

    def __init__(self) -> None:
        self._left = torch.empty(0, dtype=torch.uint8)

    def zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A tensor that takes no memory until it is written to, in whole huge pages then."""
        count = prod(shape) * dtype.itemsize
        room = -(-count // LINE) * LINE
        if room > len(self._left):
            self._left = _mapped(max(room, CHUNK))
        taken, self._left = self._left[:count], self._left[room:]
        return taken.view(dtype).view(shape)

    def copy(self, tensor: Tensor) -> Tensor:
        """A contiguous copy."""
        return self.zeros(*tensor.shape, dtype=tensor.dtype).copy_(tensor)


@cache
def huge_pages() -> HugePages:
    """Those of this process."""
    return HugePages()


def trim_memory() -> None:
    """Return to the system what was freed in this process: glibc keeps what it may need again, after a start 30 MB."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _mapped(count: int) -> Tensor:
    """``count`` bytes of zeros that begin with a huge page."""
    memory = mmap.mmap(-1, count + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel built without them: a hint that is not taken
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE
    return whole[start : start + count]
