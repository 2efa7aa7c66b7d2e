"""Limits of keys, by a clock that the tests turn."""

import math
import re
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from server.access.key import ApiKey, KeyLimits
from server.access.limits import MINUTE, UNSTATED_ANSWER, Admission, Bucket, Limiter, duration
from server.errors import QuotaUsedUp, RateLimited

TINY = 1e-3


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Spent:
    """A budget's counter that a test sets."""

    tokens: dict[str, int] = field(default_factory=dict)

    def spent(self, key: str) -> int:
        return self.tokens.get(key, 0)

    def month_left(self) -> float:
        return 86_400.0


def key(id_: str = "k", **limits: int) -> ApiKey:
    return ApiKey(id_, f"name of {id_}", frozenset({"infer"}), limits=KeyLimits(**limits))


def limiter() -> tuple[Limiter, Clock, Spent]:
    clock, spent = Clock(), Spent()
    return Limiter(clock, spent), clock, spent


def refused(limiter: Limiter, key: ApiKey) -> RateLimited:
    with pytest.raises(RateLimited) as caught:
        limiter.admit(key)
    return caught.value


@given(
    st.integers(1, 10_000),
    st.lists(st.tuples(st.floats(0, 90), st.integers(1, 3000)), max_size=40),
)
def test_a_bucket_never_gives_more_than_its_rate(capacity: int, steps: list[tuple[float, int]]) -> None:
    bucket, now = Bucket(capacity, 0.0), 0.0
    taken: list[tuple[float, int]] = []
    for pause, units in steps:
        now += pause
        if units <= capacity and bucket.wait(units, now) == 0:
            bucket.take(units, now)
            taken.append((now, units))
    for first, (begin, _) in enumerate(taken):
        total = 0
        for end, units in taken[first:]:
            total += units
            assert total <= capacity * (1 + (end - begin) / MINUTE) + TINY


@given(st.integers(1, 10_000), st.integers(0, 10_000), st.integers(1, 10_000))
def test_a_bucket_asks_for_exactly_the_time_it_needs(capacity: int, used: int, units: int) -> None:
    units = min(units, capacity)
    bucket = Bucket(capacity, 0.0)
    bucket.take(used, 0.0)
    wait = bucket.wait(units, 0.0)
    assert bucket.wait(units, wait) == 0
    if wait > TINY:
        assert bucket.wait(units, wait * 0.999) > 0


@given(st.lists(st.tuples(st.floats(-60, 60), st.integers(-50, 150)), max_size=30))
def test_a_clock_that_goes_backwards_gives_nothing(steps: list[tuple[float, int]]) -> None:
    bucket, now = Bucket(100, 0.0), 0.0
    for pause, units in steps:
        before = bucket.level(now)
        now += pause
        if pause < 0:
            assert bucket.level(now) <= before + TINY
        bucket.take(units, now)
        assert bucket.level(now) <= 100


def test_requests_in_a_minute() -> None:
    limits, clock, _ = limiter()
    three = key(requests_per_minute=3)
    for _ in range(3):
        limits.admit(three).close()
    error = refused(limits, three)
    assert (error.code, error.retry_after) == ("rate_limit_exceeded", pytest.approx(20))
    assert "requests per min (RPM): limit 3, used 3, requested 1. Please try again in 20s" in str(error)
    limits.admit(key("other", requests_per_minute=3)).close()  # has a bucket of its own
    clock.now += 19.9
    refused(limits, three)
    clock.now += 0.1
    limits.admit(three).close()
    refused(limits, three)


def test_requests_at_once() -> None:
    limits, _, _ = limiter()
    two = key(parallel_requests=2)
    first, second = limits.admit(two), limits.admit(two)
    assert refused(limits, two).retry_after == 1
    first.close()
    first.close()
    third = limits.admit(two)
    refused(limits, two)
    for admission in (second, third):
        admission.close()
    assert len([limits.admit(two) for _ in range(2)]) == 2


def test_tokens_are_reserved_and_settled() -> None:
    limits, clock, _ = limiter()
    thousand = key(tokens_per_minute=1000)
    first = limits.admit(thousand)
    first.reserve(100, 2, 300)
    assert limits.headers(thousand)["x-ratelimit-remaining-tokens"] == "300"
    second = limits.admit(thousand)
    with pytest.raises(RateLimited, match="limit 1000, used 700, requested 400") as caught:
        second.reserve(100, 1, 300)
    assert caught.value.retry_after == pytest.approx(6)
    second.close()
    first.settle(150)
    assert limits.headers(thousand)["x-ratelimit-remaining-tokens"] == "850"
    first.close()
    assert limits.headers(thousand)["x-ratelimit-remaining-tokens"] == "850"
    clock.now += 9
    assert limits.headers(thousand)["x-ratelimit-reset-tokens"] == "0s"


def test_a_request_that_is_refused_for_its_tokens_counts_for_nothing() -> None:
    limits, _, _ = limiter()
    both = key(requests_per_minute=5, tokens_per_minute=100)
    admission = limits.admit(both)
    admission.reserve(100, 0, 0)
    other = limits.admit(both)
    with pytest.raises(RateLimited):
        other.reserve(50, 0, 0)
    other.close()
    assert limits.headers(both)["x-ratelimit-remaining-requests"] == "4"
    admission.close()
    assert limits.headers(both)["x-ratelimit-remaining-tokens"] == "100", "nothing was used"


def test_a_large_estimate_needs_a_full_bucket_and_no_more() -> None:
    limits, clock, _ = limiter()
    thousand = key(tokens_per_minute=1000)
    first = limits.admit(thousand)
    first.reserve(900, 4, 2000)
    with pytest.raises(RateLimited) as caught:
        limits.admit(thousand).reserve(1, 1, 1)
    assert caught.value.retry_after == pytest.approx(MINUTE * 7902 / 1000)
    first.settle(950)
    limits.admit(thousand).reserve(1, 1, 49)
    clock.now += MINUTE
    limits.admit(thousand).reserve(1, 1, 10**6)


def test_a_prompt_above_the_limit_is_refused_for_good() -> None:
    limits, _, _ = limiter()
    with pytest.raises(RateLimited, match="Request too large") as caught:
        limits.admit(key(tokens_per_minute=1000)).reserve(1001, 1, 1)
    assert caught.value.retry_after is None


def test_an_answer_of_unstated_length_reserves_a_usual_one() -> None:
    limits, _, _ = limiter()
    thousand = key(tokens_per_minute=1000)
    limits.admit(thousand).reserve(100, 2, None)
    left = 1000 - 100 - 2 * UNSTATED_ANSWER
    assert limits.headers(thousand)["x-ratelimit-remaining-tokens"] == str(left)


def test_the_budget_of_a_month() -> None:
    limits, _, spent = limiter()
    budget = key(tokens_per_month=1000)
    spent.tokens["k"] = 900
    first = limits.admit(budget)
    first.reserve(50, 1, 49)
    second = limits.admit(budget)
    second.reserve(50, 1, 10**6)  # one token was left: the last request may go beyond
    third = limits.admit(budget)
    with pytest.raises(RateLimited, match="reserved by running requests") as caught:
        third.reserve(1, 1, 1)
    assert (caught.value.code, caught.value.retry_after) == ("rate_limit_exceeded", 1)
    for admission in (first, second, third):
        admission.close()
    spent.tokens["k"] = 1000
    error = refused(limits, budget)
    assert isinstance(error, QuotaUsedUp)
    assert (error.code, error.retry_after) == ("insufficient_quota", 86_400)


def test_limits_that_change_keep_what_was_used() -> None:
    limits, _, _ = limiter()
    for _ in range(3):
        limits.admit(key(requests_per_minute=5)).close()
    assert limits.headers(key(requests_per_minute=10))["x-ratelimit-remaining-requests"] == "7"
    assert limits.headers(key(requests_per_minute=2))["x-ratelimit-remaining-requests"] == "0"
    limits.admit(key()).close()


def test_keys_whose_state_says_nothing_are_forgotten() -> None:
    limits, clock, _ = limiter()
    busy = limits.admit(key("busy", requests_per_minute=60))
    for number in range(100):
        limits.admit(key(f"k{number}", requests_per_minute=60, tokens_per_minute=10)).close()
    assert len(limits) == 101
    clock.now += 1
    limits.admit(key("new", parallel_requests=1)).close()
    assert len(limits) == 2
    busy.close()


@given(st.floats(0, 10**6))
def test_durations_are_written_as_openai_writes_them(seconds: float) -> None:
    text = duration(seconds)
    if match := re.fullmatch(r"([1-9]\d{0,2})ms", text):
        read = int(match[1]) / 1000
    else:
        found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?([\d.]+)s", text)
        assert found, text
        read = int(found[1] or 0) * 3600 + int(found[2] or 0) * 60 + float(found[3])
    assert seconds - 1e-6 <= read <= seconds + 0.001 + 1e-6


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.12, "120ms"), (1, "1s"), (8.64, "8.64s"), (59.9999, "1m0s"), (360, "6m0s"), (3661.5, "1h1m1.5s")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


class Requests(RuleBasedStateMachine):
    """Requests of one key in any order: nothing leaks, and no limit is exceeded."""

    @initialize(
        rpm=st.none() | st.integers(1, 50),
        tpm=st.none() | st.integers(1, 2000),
        parallel=st.none() | st.integers(1, 4),
        budget=st.none() | st.integers(1, 3000),
    )
    def begin(self, rpm: int | None, tpm: int | None, parallel: int | None, budget: int | None) -> None:
        self.limits, self.clock, self.counter = limiter()
        self.key = ApiKey("k", "k", frozenset(), limits=KeyLimits(rpm, tpm, parallel, budget))
        self.open: list[tuple[Admission, int]] = []
        self.admitted: list[float] = []
        self.used: list[tuple[float, int]] = []
        self.estimates: list[int] = []

    @rule(seconds=st.floats(0, 30))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(prompt=st.integers(1, 500), answers=st.integers(0, 3), most=st.none() | st.integers(0, 300))
    def ask(self, prompt: int, answers: int, most: int | None) -> None:
        before = dict(self.limits.headers(self.key))
        try:
            admission = self.limits.admit(self.key)
        except RateLimited:
            assert self.limits.headers(self.key) == before
            return
        try:
            admission.reserve(prompt, answers, most)
        except RateLimited as error:
            admission.close()
            assert self.limits.headers(self.key) == before
            tpm = self.key.limits.tokens_per_minute
            assert (error.retry_after is None) == (tpm is not None and prompt > tpm)  # noqa: PT017
            return
        budget = self.key.limits.tokens_per_month
        if budget is not None:
            assert self.counter.spent("k") + sum(estimate for _, estimate in self.open) < budget
        self.admitted.append(self.clock.now)
        self.open.append((admission, prompt + answers * (UNSTATED_ANSWER if most is None else most)))

    @rule(share=st.floats(0, 1), index=st.integers(0, 10), settled=st.booleans())
    def end(self, share: float, index: int, settled: bool) -> None:
        if self.open:
            admission, estimate = self.open.pop(index % len(self.open))
            self.estimates.append(estimate)
            used = math.floor(estimate * share)
            if settled:
                admission.settle(used)
                admission.settle(0)  # only the first counts
                self.counter.tokens["k"] = self.counter.spent("k") + used
            admission.close()
            admission.close()
            self.used.append((self.clock.now, used if settled else 0))

    @invariant()
    def nothing_leaks(self) -> None:
        if not hasattr(self, "open"):
            return
        state = self.limits._states.get("k")
        assert (state.running if state else 0) == len(self.open)
        assert (state.reserved if state else 0) == sum(estimate for _, estimate in self.open)

    @invariant()
    def no_limit_is_exceeded(self) -> None:
        if not hasattr(self, "open"):
            return
        limits = self.key.limits
        if limits.parallel_requests is not None:
            assert len(self.open) <= limits.parallel_requests
        if limits.requests_per_minute is not None and self.admitted:
            span = self.admitted[-1] - self.admitted[0]
            assert len(self.admitted) <= limits.requests_per_minute * (1 + span / MINUTE) + TINY
        if limits.tokens_per_minute is not None:
            # What ended, and what may still be used by what runs. One estimate may be larger than the bucket.
            estimates = [*self.estimates, *(estimate for _, estimate in self.open)]
            used = sum(tokens for _, tokens in self.used) + sum(estimate for _, estimate in self.open)
            extra = max([limits.tokens_per_minute, *estimates])
            assert used <= extra + limits.tokens_per_minute * self.clock.now / MINUTE + TINY

    def teardown(self) -> None:
        if not hasattr(self, "open"):
            return
        for admission, _ in self.open:
            admission.close()
        self.clock.now += 10**7
        state = self.limits._states.get("k")
        assert state is None or state.idle(self.clock.now)


TestRequests = Requests.TestCase
TestRequests.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
