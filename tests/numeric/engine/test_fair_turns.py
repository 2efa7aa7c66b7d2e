"""Tenants and adapters share an engine: who is served when, what that costs in loads, and that no answer changes."""

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from server.engine.sequence import SamplingParams
from server.engine.sequence import Sequence as EngineSequence
from tests.numeric.drive import Drive, settings
from tests.numeric.engine.test_many import PROMPT, write_adapters
from tests.numeric.lab import Lab
from tests.numeric.oracle import Mix
from tests.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

STEP_TOKENS = 16
FLOOD, LIGHT = (("all", 1.0),), (("odd", 1.0),)


def ask(drive: Drive, tenant: str, mix: Mix, prompt: tuple[int, ...], length: int, priority: int = 0) -> str:
    """Submit a greedy request of a tenant; return its id."""
    sampling = SamplingParams(temperature=0, max_tokens=length)
    id_ = f"s{len(drive.tokens)}"
    return drive.submit_sequence(
        EngineSequence(id_, list(prompt), sampling, drive.adaptation(mix), tenant=tenant, priority=priority)
    )


def steps_to_first_token(drive: Drive, prompt: tuple[int, ...], flood: Callable[[], object] | None = None) -> int:
    """Return how many forward passes the light tenant waits for its first token, while a flood goes on."""
    before = drive.engine.stats().steps
    light = ask(drive, "light", LIGHT, prompt, 4)
    while not drive.tokens[light]:
        if flood:
            flood()
        drive.step()
    return drive.engine.stats().steps - before


@pytest.mark.parametrize("length", [5, 16, 40])
def test_a_flood_on_one_adapter_leaves_another_tenant_its_time_to_first_token(
    llama: Lab, tmp_path: Path, length: int
) -> None:
    """Counted in steps, at most twice those alone. All answers are what they are alone, to the bit."""
    drive = llama.drive(tmp_path, max_batch_tokens=STEP_TOKENS, max_device_adapters=2, max_batch_sequences=4)
    prompt, flood_prompt = tuple(range(60, 60 + length)), tuple(range(100, 120))
    for mix in (FLOOD, LIGHT):
        ask(drive, "warm", mix, (1, 2, 3), 1)
    drive.run()
    alone = steps_to_first_token(drive, prompt)
    drive.run()
    assert alone == -(-length // STEP_TOKENS)

    flooded: list[str] = []

    def flood() -> None:
        while drive.engine.stats().waiting + drive.engine._messages.qsize() < 12:
            flooded.append(ask(drive, "flood", FLOOD, flood_prompt, 24))

    for start in range(6):
        for _ in range(start + 1):
            flood()
            drive.step()
        # Another last token each time, so that no prefix is cached.
        assert steps_to_first_token(drive, (200 + start, *prompt[1:]), flood) <= 2 * alone
    assert drive.engine.stats().preemptions > 0, "the places were all taken"
    drive.run()
    expected = llama.oracle.solo(FLOOD, flood_prompt, 24).tokens
    assert {tuple(drive.tokens[id_]) for id_ in flooded} == {expected}


def test_answers_do_not_depend_on_tenants_priorities_and_preemptions(llama: Lab, tmp_path: Path) -> None:
    drive = llama.drive(tmp_path, max_batch_tokens=STEP_TOKENS, max_device_adapters=2, max_batch_sequences=4)
    drive = llama.drive(tmp_path / "small", kv_memory_gib=drive.memory_for(30), max_batch_tokens=STEP_TOKENS)
    rng = random.Random(3)
    mixes: list[Mix] = [(), FLOOD, LIGHT, (("one", 0.5), ("last", 0.5))]
    asked = {}
    for _ in range(60):
        mix, start, length = rng.choice(mixes), rng.randrange(40), rng.randrange(1, 14)
        prompt = tuple(range(start, start + rng.randrange(1, 40)))
        tenant, priority = rng.choice(("", "a", "b")), rng.randrange(-3, 4)
        asked[ask(drive, tenant, mix, prompt, length, priority)] = (mix, prompt, length)
        drive.step()
    drive.run()
    assert drive.engine.stats().preemptions > 0
    for id_, request in asked.items():
        assert tuple(drive.tokens[id_]) == llama.oracle.solo(*request).tokens


# Loads. With k slots and a adapters, a queue costs a loads, and k more at most for each max_wait_seconds that it takes.


def make_drive(tmp_path: Path, adapters: int, slots: int, wait: float) -> Drive:
    (tmp_path / "source").mkdir(parents=True)
    folders = write_adapters(tmp_path / "source", adapters)
    changes = {"max_device_adapters": slots, "max_rank": 16, "max_wait_seconds": wait, "max_queue": 2000}
    return Drive(tiny_model("llama"), folders, settings(tmp_path, **changes))


def run_queue(drive: Drive, adapters: int, each: int) -> float:
    """Submit ``each`` requests of all adapters in a random order, and run them. Returns the seconds that it took."""
    names = [f"a{index}" for index in range(adapters)] * each
    random.Random(1).shuffle(names)
    started = time.monotonic()
    for name in names:
        drive.submit(((name, 1.0),), PROMPT, SamplingParams(temperature=0, max_tokens=3))
    drive.run()
    assert len(drive.finish) == len(names)
    return time.monotonic() - started


@pytest.mark.parametrize(("adapters", "slots"), [(2, 1), (17, 16), (64, 8)])
def test_a_queue_loads_each_adapter_once(tmp_path: Path, adapters: int, slots: int) -> None:
    """More adapters than slots cost their own loads only, and at most half as many steps again."""
    roomy = make_drive(tmp_path / "roomy", adapters, adapters, 1000.0)
    run_queue(roomy, adapters, 5)
    drive = make_drive(tmp_path / "tight", adapters, slots, 1000.0)
    run_queue(drive, adapters, 5)
    assert drive.engine.stats().adapter_loads == adapters
    assert drive.engine.stats().steps <= 1.5 * roomy.engine.stats().steps + 10


@pytest.mark.parametrize(("adapters", "slots"), [(17, 16), (64, 8)])
def test_a_queue_in_which_requests_wait_long_loads_little_more(tmp_path: Path, adapters: int, slots: int) -> None:
    wait = 0.2
    drive = make_drive(tmp_path, adapters, slots, wait)
    seconds = run_queue(drive, adapters, 10)
    assert drive.engine.stats().adapter_loads <= adapters + slots * (seconds / wait + 1)


def test_one_request_of_another_adapter_costs_two_loads_and_waits_for_a_bounded_time(tmp_path: Path) -> None:
    """A, B, A, A, ... with one slot: its own load, and that of the one that it displaced."""
    drive = make_drive(tmp_path, 2, 1, 0.1)
    sampling = SamplingParams(temperature=0, max_tokens=6)
    asked, started, waited = "", time.monotonic(), 0.0
    for number in range(400):
        while len(drive.open) < 4 + bool(asked and not waited):
            drive.submit((("a0", 1.0),), PROMPT, sampling)
        if number == 50:
            asked, started = drive.submit((("a1", 1.0),), PROMPT, sampling), time.monotonic()
        drive.step()
        if asked and not waited and drive.tokens[asked]:
            waited = time.monotonic() - started
    drive.run()
    assert 0.1 < waited < 2.0
    assert drive.engine.stats().adapter_loads == 3
