"""Pinned adapters are loaded without a request, are never evicted, and leave space for other adapters."""

import logging
import random
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from adapters.format.spec import AdapterId
from server.engine.sequence import SamplingParams
from server.errors import InvalidRequest
from tests.numeric.drive import DEADLINE, Drive
from tests.numeric.lab import Lab
from tests.numeric.oracle import Mix, draw_requests

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = tuple(range(30, 42))
LONG = SamplingParams(temperature=0, max_tokens=60)
SHORT = SamplingParams(temperature=0, max_tokens=6)


def pin(drive: Drive, *names: str) -> frozenset[AdapterId]:
    """Pin adapters by name; returns their contents."""
    adaptation = drive.adaptation(tuple((name, 1.0) for name in names))
    drive.engine.pin(adaptation)
    return frozenset(adapted.id for adapted in adaptation)


def step_until_resident(drive: Drive, adapters: Iterable[AdapterId]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not drive.resident().issuperset(adapters):
        drive.step()
        assert time.monotonic() < deadline, drive.engine.stats()


def test_pins_are_loaded_without_a_request(llama: Lab, tmp_path: Path) -> None:
    """By an idle engine on its own thread, which waits for a message."""
    drive = llama.drive(tmp_path, max_device_adapters=4)
    drive.engine.start()
    for names in (("all", "odd", "last"), ("one",), ()):
        pinned = pin(drive, *names)
        deadline = time.monotonic() + DEADLINE
        while drive.engine.stats().pinned_adapters != pinned or not drive.resident() >= pinned:
            assert time.monotonic() < deadline, drive.engine.stats()
            time.sleep(0.001)
    drive.engine.stop()
    drive.engine.check()


def test_pins_are_not_evicted_under_load(llama: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One slot is left for five other adapters and their mixes with the pinned ones."""
    rng = random.Random(1)
    drive = llama.drive(tmp_path, max_device_adapters=3)
    pinned = pin(drive, "all", "odd")
    step_until_resident(drive, pinned)
    evicted: list[AdapterId] = []
    original = drive.engine.runner.evict
    monkeypatch.setattr(drive.engine.runner, "evict", lambda adapter: (evicted.append(adapter), original(adapter)))
    alone: list[Mix] = [((name, 1.0),) for name in llama.folders]
    mixed: list[Mix] = [(("all", 0.5), ("one", 0.5)), (("all", 0.3), ("last", 0.4), ("odd", 0.3))]
    requests = draw_requests(llama.oracle, [(), *alone, *mixed] * 4, rng)
    rng.shuffle(requests)
    drive.serve(requests, rng)
    assert evicted
    assert not pinned.intersection(evicted)
    assert drive.resident() >= pinned


def test_an_unpinned_adapter_can_be_evicted(llama: Lab, tmp_path: Path) -> None:
    drive = llama.drive(tmp_path, max_device_adapters=2)
    step_until_resident(drive, pin(drive, "all"))
    pin(drive)
    for name in ("odd", "one"):
        drive.submit(((name, 1.0),), PROMPT, SHORT)
        drive.run()
    assert drive.resident() == {drive.specs["odd"].id, drive.specs["one"].id}
    assert not drive.engine.stats().pinned_adapters


def test_a_pin_is_loaded_on_a_saturated_device(llama: Lab, tmp_path: Path) -> None:
    """Both slots are always leased: there are always more requests for the resident adapters."""
    drive = llama.drive(tmp_path, max_device_adapters=2)
    hot = ("all", "odd")
    for name in hot * 2:
        drive.submit(((name, 1.0),), PROMPT, SHORT)
    while not drive.resident().issuperset(drive.specs[name].id for name in hot):
        drive.step()
    pinned = pin(drive, "one")
    deadline = time.monotonic() + DEADLINE
    while not drive.resident() >= pinned:
        for event in drive.step():
            if event.finish:
                drive.submit(((random.Random(len(drive.tokens)).choice(hot), 1.0),), PROMPT, SHORT)
        assert time.monotonic() < deadline, drive.engine.stats()
    drive.run()
    assert not drive.failed


def test_a_pin_that_does_not_fit_yet_delays_no_request(llama: Lab, tmp_path: Path) -> None:
    """Three pages for the pin, four in all, two of them leased for long: one more adapter is served meanwhile."""
    drive = llama.drive(tmp_path, max_device_adapters=4, max_rank=24, device_ranks=32, max_wait_seconds=60)
    running = drive.submit((("last", 1.0),), PROMPT, LONG)
    while not drive.tokens[running]:
        drive.step()
    pinned = pin(drive, "rslora")
    for _ in range(5):
        drive.step()
    served = drive.submit((("one", 1.0),), PROMPT, SHORT)
    while served in drive.open:
        drive.step()
    assert running in drive.open
    assert not drive.resident() & pinned
    drive.run()
    step_until_resident(drive, pinned)
    assert tuple(drive.tokens[served]) == llama.oracle.solo((("one", 1.0),), PROMPT, 6).tokens


def test_too_many_pins_are_refused(llama: Lab, tmp_path: Path) -> None:
    drive = llama.drive(tmp_path, max_device_adapters=3, max_rank=24, device_ranks=48)
    assert drive.engine.can_pin([8, 8])
    assert drive.engine.can_pin([24, 16])
    assert not drive.engine.can_pin([8, 8, 8]), "no slot would be left"
    assert not drive.engine.can_pin([24, 24]), "no page would be left"
    pinned = pin(drive, "all")
    with pytest.raises(InvalidRequest, match="cannot be pinned together"):
        pin(drive, "all", "odd", "one")
    step_until_resident(drive, pinned)
    assert drive.engine.stats().pinned_adapters == pinned


def test_adapters_that_can_never_fit_beside_pins_are_refused(llama: Lab, tmp_path: Path) -> None:
    drive = llama.drive(tmp_path, max_device_adapters=3)
    mix: Mix = (("one", 0.5), ("last", 0.5))
    drive.submit(mix, PROMPT, SHORT)
    drive.run()
    step_until_resident(drive, pin(drive, "all", "odd"))
    with pytest.raises(InvalidRequest, match=r"2 adapters .* of which pinned adapters take 2 and 2") as refused:
        drive.submit(mix, PROMPT, SHORT)
    assert refused.value.param == "adapter"
    with_pinned: Mix = (("all", 0.5), ("last", 0.5))
    served = drive.submit(with_pinned, PROMPT, SHORT)
    drive.run()
    assert tuple(drive.tokens[served]) == llama.oracle.solo(with_pinned, PROMPT, 6).tokens


def test_waiting_requests_that_new_pins_make_impossible_fail(llama: Lab, tmp_path: Path) -> None:
    """At once, while other adapters still run. A request that still fits is served."""
    drive = llama.drive(tmp_path, max_device_adapters=3)
    running = drive.submit((("one", 1.0),), PROMPT, LONG)
    while not drive.tokens[running]:
        drive.step()
    impossible = drive.submit((("patterns", 0.5), ("last", 0.2), ("odd", 0.3)), PROMPT, SHORT)
    possible = drive.submit((("rslora", 1.0),), PROMPT, SHORT)
    drive.step()
    pinned = pin(drive, "all")
    drive.run()
    assert drive.failed.keys() == {impossible}
    assert "of which pinned adapters take 1" in drive.failed[impossible]
    assert drive.resident() >= pinned
    assert tuple(drive.tokens[running]) == llama.oracle.solo((("one", 1.0),), PROMPT, 60).tokens
    assert tuple(drive.tokens[possible]) == llama.oracle.solo((("rslora", 1.0),), PROMPT, 6).tokens


def test_a_pin_that_cannot_be_loaded_is_logged_once(
    llama: Lab, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is tried again for a request and when it is pinned again. Other pins are loaded."""
    drive = llama.drive(tmp_path, max_device_adapters=3)
    path, aside = drive.store.path(drive.specs["all"].id), tmp_path / "aside"
    shutil.move(path, aside)
    with caplog.at_level(logging.ERROR):
        caplog.clear()  # the start said how this model is computed
        pin(drive, "all", "odd")
        step_until_resident(drive, [drive.specs["odd"].id])
        for _ in range(50):
            drive.step()
        assert len(caplog.records) == 1
        asked = drive.submit((("all", 1.0),), PROMPT, SHORT)
        drive.run()
    assert len(caplog.records) == 2
    assert drive.failed.keys() == {asked}
    shutil.move(aside, path)
    step_until_resident(drive, pin(drive, "all", "odd"))


def test_no_device_memory_for_one_pin_leaves_the_other(
    llama: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an idle engine's own thread: no other message wakes it."""
    drive = llama.drive(tmp_path, max_device_adapters=3)
    place = drive.engine.runner.place
    lost, well = drive.specs["all"].id, drive.specs["odd"].id

    def full(adapter: AdapterId, pages: tuple[int, ...], packed: object) -> None:
        if adapter == lost:
            raise MemoryError("no room")
        place(adapter, pages, packed)

    monkeypatch.setattr(drive.engine.runner, "place", full)
    drive.engine.start()
    pin(drive, "all", "odd")
    deadline = time.monotonic() + DEADLINE
    while drive.resident() != {well}:
        assert time.monotonic() < deadline, drive.engine.stats()
        time.sleep(0.001)
    drive.engine.stop()
    drive.engine.check()


def test_a_removed_adapter_stays_until_it_is_unpinned(llama: Lab, tmp_path: Path) -> None:
    drive = llama.drive(tmp_path, max_device_adapters=3)
    pinned = pin(drive, "all")
    step_until_resident(drive, pinned)
    drive.engine.remove_adapter(drive.specs["all"].id)
    for _ in range(3):
        drive.step()
    assert drive.resident() >= pinned
    pin(drive)
    drive.step()
    assert not drive.resident()
    assert not drive.engine.stats().host_adapters
