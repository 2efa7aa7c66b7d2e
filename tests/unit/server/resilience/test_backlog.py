"""Backlog: a bound on waiting requests, and one on the tokens of their prompts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.resilience.backlog import Backlog
from server.engine.sequence import SamplingParams, Sequence
from server.errors import QueueFull


def sequence(name: object, tokens: int = 3) -> Sequence:
    return Sequence(str(name), list(range(tokens)), SamplingParams())


def test_requests_are_bounded_until_they_end() -> None:
    backlog = Backlog(2, 1, 1000)
    for number in range(3):
        backlog.admit(sequence(number))
    backlog.begin(["0"])
    with pytest.raises(QueueFull, match="Too many requests are waiting") as full:
        backlog.admit(sequence("x"))
    assert full.value.retry_after is not None
    assert full.value.code == "queue_full"
    backlog.end(["0", "unknown"])
    backlog.admit(sequence("x"))
    assert len(backlog) == 3


def test_tokens_are_bounded_until_a_prompt_begins() -> None:
    backlog = Backlog(100, 1, 10)
    backlog.admit(sequence("a", 6))
    backlog.admit(sequence("b", 4))
    with pytest.raises(QueueFull, match="Too many prompt tokens"):
        backlog.admit(sequence("c", 1))
    assert len(backlog) == 2
    backlog.begin(["a"])
    backlog.begin(["a"])
    backlog.admit(sequence("c", 6))
    assert backlog.waiting_tokens == 10


def test_a_single_prompt_may_be_longer_than_the_bound() -> None:
    backlog = Backlog(100, 1, 10)
    backlog.admit(sequence("long", 50))
    with pytest.raises(QueueFull):
        backlog.admit(sequence("short", 1))
    backlog.end(["long"])
    backlog.admit(sequence("longer", 60))


@given(st.lists(st.tuples(st.sampled_from(["admit", "begin", "end"]), st.integers(0, 9), st.integers(1, 20))))
def test_it_counts_what_was_admitted_and_has_not_begun_or_ended(steps: list[tuple[str, int, int]]) -> None:
    backlog = Backlog(4, 2, 40)
    waiting: dict[str, int] = {}
    unfinished: set[str] = set()
    for what, number, tokens in steps:
        name = str(number)
        if what == "admit" and name not in unfinished:
            fits = len(unfinished) < 6 and (not waiting or sum(waiting.values()) + tokens <= 40)
            if not fits:
                with pytest.raises(QueueFull):
                    backlog.admit(sequence(name, tokens))
                continue
            backlog.admit(sequence(name, tokens))
            waiting[name] = tokens
            unfinished.add(name)
        elif what == "begin":
            backlog.begin([name])
            waiting.pop(name, None)
        elif what == "end":
            backlog.end([name])
            waiting.pop(name, None)
            unfinished.discard(name)
        assert (len(backlog), backlog.waiting_tokens) == (len(unfinished), sum(waiting.values()))
