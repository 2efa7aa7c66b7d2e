"""Memory in huge pages: tensors that share a chunk, and what the system was asked for."""

import sys
from pathlib import Path

import pytest
import torch

from server.compute.cpu.memory import CHUNK, HUGE, LINE, HugePages


def test_tensors_share_a_chunk_and_not_a_byte() -> None:
    pages = HugePages()
    tensors = [pages.zeros(3, size, dtype=dtype) for size in (1, 7, 1000) for dtype in (torch.uint8, torch.bfloat16)]
    for value, tensor in enumerate(tensors, 1):
        assert not tensor.any()
        assert tensor.data_ptr() % LINE == 0
        tensor.fill_(value)
    assert [tensor.unique().tolist() for tensor in tensors] == [[value] for value in range(1, len(tensors) + 1)]
    assert tensors[0].data_ptr() % HUGE == 0
    assert tensors[-1].data_ptr() - tensors[0].data_ptr() < HUGE


def test_what_a_chunk_does_not_hold_gets_one_of_its_own() -> None:
    pages = HugePages()
    small, large = pages.zeros(5, dtype=torch.float32), pages.zeros(CHUNK + 1, dtype=torch.uint8)
    large[-1] = 1
    assert large.shape == (CHUNK + 1,)
    assert not small.any()


def test_a_copy_is_contiguous() -> None:
    of = torch.arange(12).view(3, 4).T
    copy = HugePages().copy(of)
    assert copy.is_contiguous()
    assert torch.equal(copy, of)


def test_a_tensor_outlives_the_rest() -> None:
    kept = [HugePages().zeros(100, dtype=torch.int64) for _ in range(20)]
    for value, tensor in enumerate(kept):
        tensor.fill_(value)
    assert [int(tensor.sum()) for tensor in kept] == [100 * value for value in range(20)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_system_is_asked_for_huge_pages() -> None:
    tensor = HugePages().zeros(CHUNK, dtype=torch.uint8)
    assert "hg" in _flags(tensor.data_ptr())


def _flags(address: int) -> list[str]:
    """VmFlags of the mapping that holds an address (proc(5), smaps)."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            return line.split()[1:]
    return []
