"""Deadlines: which have passed, and which cannot be met any more."""

import pytest

from server.engine.sequence import Batch, Chunk
from server.engine.waiting.deadlines import Deadlines
from tests.unit.server.waiting.schedulers import sequence

FULL = 100
"""Tokens of a full step."""


def stepped(tokens: int, seconds: float, deadlines: Deadlines | None = None) -> Deadlines:
    """Return deadlines that have seen a step of so many tokens."""
    deadlines = deadlines or Deadlines(FULL)
    deadlines.record_step(Batch((Chunk(sequence("a", tokens), 0, tokens),), ()), seconds)
    return deadlines


@pytest.mark.parametrize(("deadline", "hopeless"), [(None, False), (13.9, False), (10.6, False), (10.4, True)])
def test_a_prompt_that_takes_too_long_at_twice_the_best_speed_is_hopeless(
    deadline: float | None, hopeless: bool
) -> None:
    """A full step took 1 second, so 100 tokens may take half a second."""
    assert stepped(FULL, 1.0).is_hopeless(sequence("a", 100, deadline=deadline), 10.0) is hopeless


def test_tokens_that_were_found_in_the_cache_need_no_time() -> None:
    waiting = sequence("a", 100, deadline=10.1)
    deadlines = stepped(FULL, 1.0)
    assert deadlines.is_hopeless(waiting, 10.0)
    waiting.computed = 90
    assert not deadlines.is_hopeless(waiting, 10.0)


def test_before_a_full_step_only_what_is_late_is_hopeless() -> None:
    """A step of few tokens says nothing: its time is mostly the same for more of them."""
    for deadlines in (Deadlines(FULL), stepped(FULL - 1, 50.0)):
        assert not deadlines.is_hopeless(sequence("a", 10_000, deadline=10.001), 10.0)
        assert deadlines.is_hopeless(sequence("a", 1, deadline=9.999), 10.0)


def test_the_fastest_step_counts() -> None:
    """So a slow moment of the machine drops nobody."""
    deadlines = stepped(FULL, 0.1, stepped(FULL, 1.0))
    stepped(FULL, 20.0, deadlines)
    assert not deadlines.is_hopeless(sequence("a", 100, deadline=10.06), 10.0)
    assert deadlines.is_hopeless(sequence("a", 100, deadline=10.04), 10.0)


def test_what_has_passed_is_found_once_it_has() -> None:
    deadlines = Deadlines(FULL)
    soon, later, never = sequence("a", deadline=5.0), sequence("a", deadline=7.0), sequence("a")
    unfinished = [later, never, soon]
    for each in unfinished:
        deadlines.add(each)
    assert deadlines.passed(unfinished, 4.9) == []
    assert deadlines.passed(unfinished, 5.0) == [soon]
    unfinished.remove(soon)
    assert deadlines.passed(unfinished, 6.0) == []
    assert deadlines.passed(unfinished, 8.0) == [later]
