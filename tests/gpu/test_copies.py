"""Adapters are copied in the background, in order, and a failure is raised where the adapter is needed."""

import pytest
import torch

from server.compute.cuda.copies import StreamCopier

pytestmark = pytest.mark.gpu


def test_a_step_that_waits_sees_the_last_copy() -> None:
    copier, target = StreamCopier(torch.device("cuda")), torch.zeros(2**24, device="cuda")
    sources = [torch.full((2**24,), float(i)).pin_memory() for i in (1, 2)]
    for source in sources:
        last = copier.start(lambda source=source: target.copy_(source, non_blocking=True))
    last.wait()
    assert target.sum().item() == 2 * 2**24
    assert last.arrived
    copier.close()


def test_a_copy_runs_after_work_that_still_reads_its_destination() -> None:
    copier, target = StreamCopier(torch.device("cuda")), torch.ones(2**24, device="cuda")
    source = torch.zeros(2**24).pin_memory()
    torch.cuda._sleep(100_000_000)  # cycles, in which the copy could overtake
    read = target.sum()
    copier.start(lambda: target.copy_(source, non_blocking=True)).wait()
    assert read.item() == 2**24
    assert target.sum().item() == 0
    copier.close()


def test_waiting_for_a_failed_copy_raises() -> None:
    def fail() -> None:
        raise ValueError("no such page")

    copier = StreamCopier(torch.device("cuda"))
    copy = copier.start(fail)
    with pytest.raises(ValueError, match="no such page"):
        copy.wait()
    assert copy.arrived
    copier.close()
