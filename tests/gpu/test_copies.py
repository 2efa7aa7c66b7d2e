"""Adapters are copied beside other work, in order, and a failure is told to whoever needs the adapter."""

import pytest
import torch

from server.compute.cuda.copies import StreamCopier

pytestmark = pytest.mark.gpu


def test_a_step_that_waits_sees_what_was_copied_last() -> None:
    copies, target = StreamCopier(torch.device("cuda")), torch.zeros(2**24, device="cuda")
    sources = [torch.full((2**24,), float(i)).pin_memory() for i in (1, 2)]
    for source in sources:
        last = copies.start(lambda source=source: target.copy_(source, non_blocking=True))
    last.wait()
    assert target.sum().item() == 2 * 2**24
    assert last.arrived
    copies.close()


def test_a_copy_comes_after_what_still_reads_the_place() -> None:
    copies, target = StreamCopier(torch.device("cuda")), torch.ones(2**24, device="cuda")
    source = torch.zeros(2**24).pin_memory()
    torch.cuda._sleep(100_000_000)  # cycles, in which the copy could overtake
    read = target.sum()
    copies.start(lambda: target.copy_(source, non_blocking=True)).wait()
    assert read.item() == 2**24
    assert target.sum().item() == 0
    copies.close()


def test_a_copy_that_fails_is_not_waited_for_in_silence() -> None:
    def fail() -> None:
        raise ValueError("no such page")

    copies = StreamCopier(torch.device("cuda"))
    copy = copies.start(fail)
    with pytest.raises(ValueError, match="no such page"):
        copy.wait()
    assert copy.arrived
    copies.close()
