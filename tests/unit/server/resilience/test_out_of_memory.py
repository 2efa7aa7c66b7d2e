"""Too little memory is known by the errors that libraries really raise."""

import mmap
from collections.abc import Callable

import numpy as np
import pytest
import torch

from server.engine.resilience.out_of_memory import is_out_of_memory
from server.engine.resilience.row_limit import GROW_SECONDS, RowLimit

HUGE = 2**58


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: bytearray(HUGE),
        lambda: torch.empty(HUGE, dtype=torch.uint8),
        lambda: torch.zeros(1).expand(HUGE // 4) + 1,
        lambda: np.empty(HUGE, np.uint8),
        lambda: mmap.mmap(-1, HUGE),
    ],
    ids=["python", "torch", "torch-operation", "numpy", "mmap"],
)
def test_errors_of_allocators(allocate: Callable[[], object]) -> None:
    with pytest.raises((MemoryError, RuntimeError, OSError)) as raised:
        allocate()
    assert is_out_of_memory(raised.value), raised.value


def test_cuda() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), OSError(2, "x"), ValueError("out of memory")])
def test_other_errors(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_the_limit_of_rows_grows_back() -> None:
    limit = RowLimit(256)
    assert limit.rows(0.0) == 256
    limit.shrink(30, 0.0)
    limit.shrink(50, 1.0)
    assert limit.rows(GROW_SECONDS) == 30
    rows = [limit.rows(1 + GROW_SECONDS * i) for i in range(1, 7)]
    assert rows == [60, 120, 240, 256, 256, 256]
    limit.shrink(0, 500.0)
    assert limit.rows(500.0) == 1
