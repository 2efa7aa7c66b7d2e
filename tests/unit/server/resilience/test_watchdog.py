"""The watchdog: a step that does not end is noticed, one that is only slow is not, and a paused process neither."""

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.resilience import step_watch
from server.engine.resilience.step_watch import FIRST_SECONDS, StepWatch
from server.watchdog import PERIOD, STUCK_SECONDS, Stall, Watchdog

LOOKS = st.lists(st.tuples(st.none() | st.integers(0, 2), st.floats(0, 30)), max_size=40)
"""Which step runs, and the seconds since the last look."""


def looked(stall: Stall, seconds: float, patience: float = 0.0, calm: float | None = None) -> Stall:
    """Look at one step once a period for ``seconds``."""
    for tick in range(int(seconds / PERIOD) + 1):
        stall.look(1, patience, patience if calm is None else calm, 100.0 + tick * PERIOD)
    return stall


def test_a_step_that_does_not_end_is_stuck_within_10_seconds_and_hopeless_after_the_timeout() -> None:
    assert STUCK_SECONDS + 2 * PERIOD <= 10
    assert not looked(Stall(120), STUCK_SECONDS - 1).stuck
    assert looked(Stall(120), STUCK_SECONDS).stuck
    assert not looked(Stall(120), 119).hopeless
    assert looked(Stall(120), 120).hopeless


def test_steps_that_end_are_never_stuck() -> None:
    stall = Stall(1)
    for step in range(1000):
        stall.look(step, 0.0, 0.0, step * 5.0)
        assert not stall.stuck


def test_a_pause_of_the_process_is_not_held_against_the_step() -> None:
    stall = looked(Stall(120), 3)
    stall.look(1, 0.0, 0.0, 100_000.0)  # suspended for a day
    assert not stall.stuck
    assert stall.seconds <= 3 + 2 * PERIOD


def test_a_step_of_which_it_is_known_that_it_takes_long_has_that_time() -> None:
    assert not looked(Stall(120), 300, patience=301).stuck
    assert looked(Stall(120), 301, patience=301).hopeless


@given(LOOKS, st.floats(0.5, 200))
def test_what_is_hopeless_is_stuck(looks: list[tuple[int | None, float]], timeout: float) -> None:
    stall, now = Stall(timeout), 0.0
    for step, passed in looks:
        now += passed
        stall.look(step, 0.0, 0.0, now)
        assert stall.stuck or not stall.hopeless
        assert step is not None or not stall.stuck


def test_a_step_whose_time_is_not_known_is_stuck_within_10_seconds_and_hopeless_much_later() -> None:
    assert not looked(Stall(120), STUCK_SECONDS - 1, patience=FIRST_SECONDS, calm=0.0).stuck
    assert looked(Stall(120), STUCK_SECONDS, patience=FIRST_SECONDS, calm=0.0).stuck
    assert not looked(Stall(120), FIRST_SECONDS - 1, patience=FIRST_SECONDS, calm=0.0).hopeless
    assert looked(Stall(120), FIRST_SECONDS, patience=FIRST_SECONDS, calm=0.0).hopeless


def test_where_no_step_compiles_the_first_of_a_kind_is_held_against_the_slowest_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(step_watch, "monotonic", lambda: now[0])
    watch = StepWatch(compiles=False)
    for rows, took, calm in ((2, 1.0, 0.0), (2, 5.0, 3.0), (200, 9.0, 15.0), (300, 1.0, 27.0)):
        watch.begin_forward(rows, adapted=False)
        assert watch.current
        assert watch.current.calm == pytest.approx(calm)
        assert watch.current.patience in (FIRST_SECONDS, calm)
        now[0] += took
        watch.end_forward()


def test_the_first_step_of_a_kind_may_compile() -> None:
    watch = StepWatch(compiles=True)
    assert watch.current is None
    for adapted in (False, True):
        watch.begin_forward(3, adapted=adapted)
        assert watch.current
        assert watch.current.patience == FIRST_SECONDS
        assert watch.current.calm == FIRST_SECONDS
        watch.end_forward()
        watch.begin_forward(2, adapted=adapted)  # as many bits: a step of the same kind
        assert watch.current.patience < 1
        watch.end_forward()
    watch.begin_forward(4, adapted=False)
    assert watch.current.patience == FIRST_SECONDS
    watch.rest()
    assert watch.current is None


def test_a_slow_processor_gets_the_time_that_its_steps_take(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(step_watch, "monotonic", lambda: now[0])
    watch = StepWatch(compiles=True)
    for took, patience in ((40.0, FIRST_SECONDS), (30.0, 120.0), (1.0, 108.0), (1.0, 97.2)):
        watch.begin_forward(200, adapted=False)
        assert watch.current
        assert watch.current.patience == pytest.approx(patience)
        now[0] += took
        watch.end_forward()


def test_the_thread_expires_once_and_recovers_before() -> None:
    watch, expired = StepWatch(compiles=False), threading.Event()
    dog = Watchdog(watch, 2.5, lambda seconds: expired.set())
    dog.start()
    watch.begin()
    deadline = time.monotonic() + 30
    while not dog.stuck:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert expired.wait(10)
    dog.close()
