"""No request starves: an adapter is loaded even if others have leases on all slots all the time."""

import time
from pathlib import Path

import pytest

from server.engine.sequence import SamplingParams
from server.errors import InvalidRequest, QueueFull
from tests.numeric.drive import Drive
from tests.numeric.lab import Lab
from tests.numeric.oracle import Mix

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = tuple(range(50, 61))
PATIENCE = 20.0
"""Seconds; the wait is over after ``max_wait_seconds``, 0.05, and a few answers' time."""


def under_traffic(drive: Drive, hot: list[Mix], cold: Mix) -> str:
    """Run six overlapping requests of ``hot`` at all times, until one of ``cold``, submitted later, has ended."""
    greedy = SamplingParams(temperature=0, max_tokens=12)
    count = 0
    asked = ""
    deadline = time.monotonic() + PATIENCE
    while not asked or asked in drive.open:
        assert time.monotonic() < deadline, "starved"
        if len(drive.open) < 6 + bool(asked):
            drive.submit(hot[count % len(hot)], PROMPT, greedy)
            count += 1
        drive.step()
        if count == 10 and not asked:
            asked = drive.submit(cold, PROMPT, greedy)
    return asked


@pytest.mark.parametrize(
    ("slots", "hot", "cold"),
    [
        (1, [(("all", 1.0),)], (("odd", 1.0),)),
        (2, [(("all", 1.0),), (("one", 1.0),)], (("odd", 0.5), ("last", 0.5))),
        (2, [(("all", 0.5), ("one", 0.5))], (("odd", 1.0),)),
        (2, [(("all", 0.5), ("one", 0.5))], (("one", 0.5), ("odd", 0.5))),
    ],
    ids=["one", "mix-for-singles", "single-for-mix", "mix-for-mix"],
)
def test_a_cold_adapter_does_not_starve(llama: Lab, tmp_path: Path, slots: int, hot: list[Mix], cold: Mix) -> None:
    drive = llama.drive(tmp_path, max_device_adapters=slots)
    asked = under_traffic(drive, hot, cold)
    drive.run()
    assert not drive.failed
    assert tuple(drive.tokens[asked]) == llama.oracle.solo(cold, PROMPT, 12).tokens


def test_mixes_that_cannot_share_the_device_take_turns(llama: Lab, tmp_path: Path) -> None:
    """Each mix needs all slots: if each held one and waited for the other, there would be a deadlock."""
    drive = llama.drive(tmp_path, max_device_adapters=2, host_cache_gib=0)
    mixes: list[Mix] = [(("all", 0.5), ("one", 0.5)), (("odd", 0.5), ("last", 0.5)), (("one", 1.0), ("odd", 1.0))]
    ids = {drive.submit(mix, PROMPT, SamplingParams(temperature=0, max_tokens=4)): mix for mix in mixes * 4}
    drive.run()
    for id_, mix in ids.items():
        assert tuple(drive.tokens[id_]) == llama.oracle.solo(mix, PROMPT, 4).tokens


def test_a_mix_too_large_for_the_device_is_refused_at_once(llama: Lab, tmp_path: Path) -> None:
    drive = llama.drive(tmp_path, max_device_adapters=2)
    with pytest.raises(InvalidRequest, match="do not fit the device"):
        drive.submit((("all", 1.0), ("one", 1.0), ("odd", 1.0)), PROMPT, SamplingParams())
    drive.run()


def test_a_full_queue_is_refused_at_once(llama: Lab, tmp_path: Path) -> None:
    drive = llama.drive(tmp_path, max_queue=3, max_batch_sequences=2)
    for _ in range(5):
        drive.submit((), PROMPT, SamplingParams(max_tokens=2))
    with pytest.raises(QueueFull):
        drive.submit((), PROMPT, SamplingParams(max_tokens=2))
    drive.run()
    drive.submit((), PROMPT, SamplingParams(max_tokens=2))
    drive.run()
    assert len(drive.finish) == 6
