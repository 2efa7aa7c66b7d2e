"""With too little memory for a step, it runs with less: nobody fails who fits alone."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adapters.format.spec import AdapterId
from server.compute.pool import AdapterPool
from server.engine.resilience import row_limit
from server.engine.sequence import Batch, Failed, SamplingParams, Sequence, StepResult
from tests.numeric.drive import Drive
from tests.numeric.lab import Lab
from tests.numeric.oracle import Mix, draw_requests

pytestmark = pytest.mark.usefixtures("one_thread")

MIXES: list[Mix] = [(), (("all", 1.0),), (("odd", 1.0),), (("all", 0.5), ("odd", 0.5))]
GREEDY = SamplingParams(temperature=0, max_tokens=12)


def allocate(rows: int, room: int) -> None:
    """Fail as torch does, if there is room for fewer rows."""
    if rows > room:
        torch.empty(2**58, dtype=torch.uint8)


def short(drive: Drive, needs: Callable[[Batch], int], room: int) -> Callable[[Batch], StepResult]:
    run = drive.engine.runner.run

    def limited(batch: Batch) -> StepResult:
        allocate(needs(batch), room)
        return run(batch)

    return limited


@pytest.mark.parametrize("room", [1, 2, 5, 20])
def test_answers_stay_and_nobody_fails(llama: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    monkeypatch.setattr(row_limit, "GROW_SECONDS", 0.05)  # so that it fails again and again
    rng = random.Random(room)
    drive = llama.drive(tmp_path, max_batch_tokens=48)
    monkeypatch.setattr(drive.engine.runner, "run", short(drive, lambda batch: batch.tokens, room))
    drive.serve(draw_requests(llama.oracle, MIXES * 4, rng), rng)
    assert drive.engine.stats().out_of_memory > 1


def test_a_smaller_step_is_not_tried_larger_at_once(
    llama: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive = llama.drive(tmp_path, max_batch_tokens=64)
    monkeypatch.setattr(drive.engine.runner, "run", short(drive, lambda batch: batch.tokens, 8))
    for index in range(8):
        drive.submit((), tuple(range(index, index + 40)), GREEDY)
    drive.run()
    assert drive.engine.stats().out_of_memory <= 6  # 64, again, 32, 16, 8 rows
    assert not drive.failed


def test_one_that_does_not_fit_alone_fails_alone(llama: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(2)
    drive = llama.drive(tmp_path)

    def needs(batch: Batch) -> int:
        return max(len(chunk.sequence.tokens) for chunk in batch.chunks)

    monkeypatch.setattr(drive.engine.runner, "run", short(drive, needs, 64))
    sequence = Sequence("large", list(range(70)), GREEDY)
    drive.tokens["other"] = []
    drive.submit_sequence(sequence)
    asked = draw_requests(llama.oracle, MIXES * 2, rng)
    ids = [drive.ask(request) for request in asked]
    events = []
    while drive.open:
        events += drive.step()
    (failed,) = [event for event in events if isinstance(event, Failed)]
    assert (failed.sequence_id, failed.cause) == ("large", "memory")
    assert "not enough memory for large" in failed.message
    assert [tuple(drive.tokens[id_]) for id_ in ids] == [request.answer for request in asked]


def test_adapters_leave_host_memory_before_a_request_suffers(
    llama: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive = llama.drive(tmp_path, max_device_adapters=1)
    rng = random.Random(4)
    drive.serve(draw_requests(llama.oracle, MIXES[1:3] * 2, rng), rng)
    assert len(drive.engine.stats().host_adapters) == 2
    run = drive.engine.runner.run

    def limited(batch: Batch) -> StepResult:
        allocate(1, 0 if drive.engine.loader.adapters else 1)
        return run(batch)

    monkeypatch.setattr(drive.engine.runner, "run", limited)
    answer = llama.oracle.solo((), (5, 6, 7), 12).tokens
    asked = drive.submit((), (5, 6, 7), GREEDY)
    drive.run()
    assert tuple(drive.tokens[asked]) == answer
    assert not drive.engine.stats().host_adapters
    assert drive.engine.stats().out_of_memory == 1


@pytest.mark.parametrize("stage", ["pack", "write"])
@pytest.mark.parametrize("times", [1, 9])
def test_an_adapter_that_does_not_fit_is_tried_once_more_and_then_fails_its_own_requests(
    llama: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, times: int
) -> None:
    """``pack``: into host memory, on the loader's thread; ``write``: to the device."""
    rng = random.Random(3)
    drive = llama.drive(tmp_path)
    drive.serve(draw_requests(llama.oracle, [(("one", 1.0),)], rng), rng)
    assert len(drive.engine.stats().host_adapters) == 1
    work, left = getattr(AdapterPool, stage), times

    def fails(pool: AdapterPool, *arguments: object) -> object:
        nonlocal left
        left -= 1
        allocate(1, 0 if left >= 0 else 1)
        return work(pool, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(AdapterPool, stage, fails)
        running = drive.submit((), (1, 2, 3), GREEDY)
        hit = drive.submit((("all", 1.0),), (1, 2, 3), GREEDY)
        drive.run()
    assert tuple(drive.tokens[running]) == llama.oracle.solo((), (1, 2, 3), 12).tokens
    assert drive.failed.keys() == (set() if times == 1 else {hit})
    if times > 1:
        assert "not enough memory to load the adapter" in drive.failed[hit]
        again = drive.submit((("all", 1.0),), (1, 2, 3), GREEDY)
        drive.run()
        assert tuple(drive.tokens[again]) == llama.oracle.solo((("all", 1.0),), (1, 2, 3), 12).tokens


def test_of_an_adapter_that_is_removed_after_a_failed_load_nothing_is_kept(llama: Lab, tmp_path: Path) -> None:
    engine = llama.drive(tmp_path).engine
    content = AdapterId("0" * 64)
    assert engine._residency._load_again(content, MemoryError())
    engine.remove_adapter(content)
    engine.step()
    assert not engine._residency._loads_again
