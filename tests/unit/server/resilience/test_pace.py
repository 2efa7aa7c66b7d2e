"""Clients that find the queue full are told to come back when half of it will have left, by its real pace."""

from math import ceil, inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.resilience.pace import MAX_SECONDS, MIN_SECONDS, WINDOW, Pace

OBSERVATIONS = st.lists(st.tuples(st.integers(0, 600), st.integers(0, 40), st.floats(-5, 50)), max_size=40)
"""How many wait, how many left, and the seconds since the last observation; clocks may jump."""


def observed(observations: list[tuple[int, int, float]]) -> Pace:
    pace, now = Pace(), 1000.0
    for waiting, left, passed in observations:
        now += passed
        pace.observe(waiting, left, now)
    return pace


def steady(rate: float, seconds: float, waiting: int = 100) -> Pace:
    """A pace after ``seconds`` in which ``rate`` requests a second left, one by one."""
    pace = Pace()
    pace.observe(waiting, 0, 0.0)
    for number in range(1, int(seconds * rate) + 1):
        pace.observe(waiting, 1, number / rate)
    return pace


@given(OBSERVATIONS, st.integers(0, 10_000))
def test_it_is_a_whole_number_within_the_bounds(observations: list[tuple[int, int, float]], waiting: int) -> None:
    seconds = observed(observations).retry_after(waiting)
    assert isinstance(seconds, int)
    assert MIN_SECONDS <= seconds <= MAX_SECONDS


@given(OBSERVATIONS, st.integers(0, 5000), st.integers(0, 5000))
def test_more_waiting_requests_never_shorten_it(
    observations: list[tuple[int, int, float]], one: int, other: int
) -> None:
    pace = observed(observations)
    assert pace.retry_after(min(one, other)) <= pace.retry_after(max(one, other))


@given(st.integers(1, 500), st.integers(1, 500), st.integers(1, 2000))
def test_a_faster_queue_never_lengthens_it(one: int, other: int, waiting: int) -> None:
    slow, fast = sorted([one / 5, other / 5])
    assert steady(fast, 40).retry_after(waiting) <= steady(slow, 40).retry_after(waiting)


@given(st.floats(0.5, 100), st.integers(1, 2000))
def test_at_a_steady_pace_half_of_the_queue_leaves_in_that_time(rate: float, waiting: int) -> None:
    told, true = steady(rate, 2 * WINDOW).retry_after(waiting), waiting / 2 / rate
    assert told == pytest.approx(min(max(ceil(true), MIN_SECONDS), MAX_SECONDS), rel=0.1, abs=1)


def test_an_idle_time_does_not_slow_the_pace() -> None:
    pace = steady(10, 20)
    pace.observe(0, 5, 20.5)
    pace.observe(600, 0, 5000.0)  # nothing came for more than an hour
    assert pace.rate() == pytest.approx(10, rel=0.1)


def test_a_queue_that_stands_still_says_so() -> None:
    pace = steady(100, 20)
    pace.observe(100, 0, 20 + WINDOW + 1)
    assert pace.rate() == 0
    assert pace.retry_after(100) == MAX_SECONDS


def test_before_anything_has_left() -> None:
    pace = Pace()
    pace.observe(600, 0, 0.0)
    assert pace.retry_after(600) == MAX_SECONDS
    assert pace.rate() == 0
    pace.observe(599, 1, 0.0)
    assert pace.rate() == inf
    assert pace.retry_after(600) == MIN_SECONDS
