"""Limits that several servers hold together: the rule by a clock that tests turn, and servers on one PostgreSQL."""

import asyncio
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import update

from adapters.errors import RegistryUnavailable
from adapters.registry.database import Database, open_postgres
from adapters.registry.schema import limit_holders
from server.access import shared_limits
from server.access.key import ApiKey, KeyLimits
from server.access.key_share import AHEAD_SECONDS, BUSY, KeyShare, Supply
from server.access.limit_table import MICRO, Answer, Ask, LimitTable, Want, decide
from server.access.limits import MINUTE, Bucket
from server.access.shared_limits import EXCHANGE_SECONDS
from server.access.usage import Meter, UsageLedger
from server.access.usage_table import Tokens, UsageTable
from server.errors import RateLimited
from tests.postgres import Postgres, postgres

TINY = 1e-3
PATIENCE = 60.0
"""Seconds after which a test fails. Long, because a busy machine may be slow."""


def key(id_: str = "k", **limits: int) -> ApiKey:
    return ApiKey(id_, f"name of {id_}", frozenset({"infer"}), limits=KeyLimits(**limits))


# The rule


@given(
    st.integers(1, 300),
    st.integers(1, 3),
    st.lists(st.tuples(st.floats(0, 4), st.integers(0, 2), st.integers(1, 20)), max_size=60),
)
@settings(deadline=None)
def test_servers_together_admit_what_one_would_in_three_seconds_more(
    capacity: int, servers: int, steps: list[tuple[float, int, int]]
) -> None:
    shares = [KeyShare(key(requests_per_minute=capacity)) for _ in range(servers)]
    bucket, now, admitted = Bucket(capacity, 0.0), 0.0, list[float]()
    for pause, server, burst in steps:
        now += pause
        share = shares[server % servers]
        for _ in range(burst):
            if share.requests.draw(1, now):
                ask = Ask("k", share.limits, [Want(requests=1)], recent_requests=share.requests.recent(now))
                answer = decide(ask, bucket, None, 0, now)
                share.requests.fill(answer.ahead_requests, now)
                if answer.refusals[0] is not None:
                    assert bucket.level(now) < 1
                    continue
            admitted.append(now)
    for first, begin in enumerate(admitted):
        for count, end in enumerate(admitted[first:], 1):
            assert count <= capacity * (1 + (end - begin + AHEAD_SECONDS) / MINUTE) + TINY


def test_a_want_gets_all_or_nothing_and_others_are_served() -> None:
    limits = KeyLimits(requests_per_minute=10, tokens_per_minute=100, parallel_requests=3)
    wants = [Want(1, place=True), Want(tokens=90, least=90), Want(tokens=20, least=20), Want(1, place=True)]
    requests, tokens = Bucket(10, 0.0), Bucket(100, 0.0)
    answer = decide(Ask("k", limits, wants, places=1), requests, tokens, 1, 0.0)
    assert [None if each is None else each.limit for each in answer.refusals] == [
        None,
        None,
        "tokens_per_minute",
        "parallel_requests",
    ]
    assert (answer.claimed, answer.requests, answer.tokens) == (2, 9, 10)
    refusal = answer.refusals[2]
    assert refusal is not None
    assert refusal.wait == pytest.approx(6)


def test_an_estimate_above_the_limit_needs_a_full_bucket_and_leaves_a_debt() -> None:
    limits = KeyLimits(tokens_per_minute=100)
    large = Want(tokens=150, least=100)
    tokens = Bucket(100, 0.0)
    assert decide(Ask("k", limits, [large]), None, tokens, 0, 0.0).refusals == [None]
    assert decide(Ask("k", limits, unused_tokens=30), None, tokens, 0, 0.0).tokens == -20
    assert decide(Ask("k", limits, [large]), None, tokens, 0, 71.9).refusals != [None]
    assert decide(Ask("k", limits, [large]), None, tokens, 0, 72.0).refusals == [None]


def test_what_was_taken_ahead_is_lost_in_time() -> None:
    supply = Supply()
    supply.fill(10, 0.0)
    assert supply.draw(4, AHEAD_SECONDS - 0.1) == 0
    assert supply.left(AHEAD_SECONDS - 0.1) == 6
    assert supply.draw(4, AHEAD_SECONDS) == 4


def test_a_burst_says_nothing_of_what_follows() -> None:
    supply = Supply()
    for now, draws, recent in ((0.0, BUSY, 0), (0.9, 1, 0), (1.1, BUSY - 1, BUSY + 1), (2.2, BUSY, 0), (3.3, 1, BUSY)):
        for _ in range(draws):
            supply.draw(1, now)
        assert supply.recent(now) == recent
    assert supply.recent(9.0) == 0


def test_the_last_half_is_not_taken_ahead() -> None:
    limits = KeyLimits(requests_per_minute=100)
    bucket = Bucket(100, 0.0)
    assert decide(Ask("k", limits, [Want(1)], recent_requests=30), bucket, None, 0, 0.0).ahead_requests == 30
    assert decide(Ask("k", limits, [Want(1)], recent_requests=90), bucket, None, 0, 0.0).ahead_requests == 34
    assert decide(Ask("k", limits, recent_requests=90), bucket, None, 0, 0.0).ahead_requests == 0, "nobody asks"


# Servers on one database


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with postgres() as server:
        yield server


@pytest.fixture
def database(server: Postgres) -> Iterator[Database]:
    opened = open_postgres(server.fresh())
    yield opened
    opened.close()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for the database, and for what other servers tell it, however slow the machine is."""
    monkeypatch.setattr(shared_limits, "WAIT_SECONDS", PATIENCE)
    monkeypatch.setattr(shared_limits, "AGAIN_SECONDS", (0.1, 0.5, 1.5))


@pytest.fixture
def exact(patient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take nothing ahead, which another server would lack. How much that is depends on how fast the machine is."""
    monkeypatch.setattr(Supply, "recent", lambda *_: 0.0)


@dataclass
class Table(LimitTable):
    """Counts what is asked, and fails if the test says so."""

    database: Database
    asked: list[Sequence[Ask]] = field(default_factory=list)
    fault: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        super().__init__(self.database, hold_seconds=2 * PATIENCE)

    def exchange(self, server: str, asks: Sequence[Ask]) -> list[Answer]:
        self.asked.append(asks)
        self.fault()
        return super().exchange(server, asks)


class Server:
    """The ledger of one server."""

    def __init__(self, database: Database, steady: Callable[[], float] = time.monotonic) -> None:
        self.table = Table(database)
        self.entered = 0
        self.refused = 0
        self.ledger = UsageLedger(UsageTable(database), steady, limits=self.table)

    async def open(self, key: ApiKey, prompt: int = 0, answer: int = 0) -> Meter:
        """Admit a request, and reserve its tokens. Raises RateLimited."""
        meter = self.ledger.open(key)
        await meter.enter()
        self.entered += 1
        try:
            await meter.reserve(prompt, 1, answer)
        except BaseException:
            meter.close()
            raise
        return meter

    async def admits(self, key: ApiKey, prompt: int = 0, answer: int = 0) -> bool:
        """Serve a whole request that uses no tokens; return whether it was admitted."""
        try:
            (await self.open(key, prompt, answer)).close()
        except RateLimited:
            self.refused += 1
            return False
        return True

    async def refusal(self, key: ApiKey) -> RateLimited:
        """Ask until a request is refused: meanwhile the bucket refills."""
        while True:
            try:
                (await self.open(key)).close()
            except RateLimited as error:
                self.refused += 1
                return error

    def left(self, key: ApiKey, of: str = "requests") -> int:
        return int(self.ledger.limiter.headers(key)[f"x-ratelimit-remaining-{of}"])


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(2 * PATIENCE):
            await scenario()

    asyncio.run(main())


def refill(capacity: int, began: float) -> float:
    """Return what a bucket may have got since ``began``, by the monotonic clock."""
    return capacity * (time.monotonic() - began) / MINUTE


async def until(condition: Callable[[], Any]) -> None:
    """Wait until ``condition`` is true, for less time than a bucket takes to refill by itself."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.02)


@pytest.mark.usefixtures("exact")
def test_two_servers_admit_what_one_would(database: Database) -> None:
    async def scenario() -> None:
        servers, limited, began = [Server(database), Server(database)], key(requests_per_minute=40), time.monotonic()
        admitted = [await servers[number % 2].admits(limited) for number in range(60)]
        assert 40 <= sum(admitted) <= 40 + refill(40, began)
        assert all(admitted[:40])
        for each in servers:
            empty = time.monotonic()
            refusal = await each.refusal(limited)
            assert each.left(limited) <= refill(40, empty)
            assert re.search(r"limit 40, used 40, requested 1\. Please try again in", str(refusal))
            assert refusal.retry_after is not None
            assert 0 < refusal.retry_after <= 1.5
        assert servers[1].left(key("other", requests_per_minute=3)) == 3
        refusals = [each.ledger.limiter.refused["requests_per_minute"] for each in servers]
        assert refusals == [each.refused for each in servers]

    run(scenario)


@pytest.mark.usefixtures("exact")
def test_bursts_on_three_servers_are_admitted_up_to_the_limit(database: Database) -> None:
    async def scenario() -> None:
        servers, limited, began = [Server(database) for _ in range(3)], key(requests_per_minute=90), time.monotonic()
        asked = [servers[number % 3].admits(limited) for number in range(240)]
        admitted = sum(await asyncio.gather(*asked))
        assert 90 <= admitted <= 90 + refill(90, began)
        wanting = [asks for each in servers for asks in each.table.asked if any(ask.wants for ask in asks)]
        assert len(wanting) < 60, "many requests share a transaction"

    run(scenario)


@pytest.mark.usefixtures("patient")
def test_a_busy_key_seldom_waits_for_the_database(database: Database) -> None:
    """By a clock that each request turns on by 10 ms, so that the key is as busy on any machine."""
    now = 0.0

    async def scenario() -> None:
        nonlocal now
        one = Server(database, lambda: now)
        limited = key(requests_per_minute=10_000, tokens_per_minute=10**6, parallel_requests=64)
        for number in range(450):
            if number == 250:  # in its first second a key asks for each of its requests
                one.table.asked.clear()
            assert await one.admits(limited, 10, 10)
            now += 0.01
        wanting = [asks for asks in one.table.asked if any(ask.wants for ask in asks)]
        assert len(wanting) <= 20
        free = key("free", tokens_per_month=10**9)
        one.ledger._spent["free"] = 0
        before = len(one.table.asked)
        assert one.ledger.open(free)._shared is None
        assert len(one.table.asked) == before

    run(scenario)


@pytest.mark.usefixtures("patient")
def test_tokens_are_reserved_and_given_back_on_all_servers(database: Database) -> None:
    async def scenario() -> None:
        one, two, limited, began = Server(database), Server(database), key(tokens_per_minute=1000), time.monotonic()
        first = await one.open(limited, 100, 800)
        with pytest.raises(RateLimited, match=r"limit 1000, used \d+, requested 900") as caught:
            await two.open(limited, 100, 800)
        used = int(str(caught.value).partition("used ")[2].partition(",")[0])
        assert 900 - refill(1000, began) - 1 <= used <= 900
        first.begin("", lambda: Tokens(100, 0, 50))
        first.close()
        await until(lambda: two.left(limited, "tokens") >= 840)  # it has refused one, so it looks again by itself
        assert two.left(limited, "tokens") <= 850 + refill(1000, began)
        (await two.open(limited, 100, 700)).close()

    run(scenario)


@pytest.mark.usefixtures("patient")
def test_a_refused_request_uses_nothing_anywhere(database: Database) -> None:
    async def scenario() -> None:
        one, two = Server(database), Server(database)
        limited, began = key(requests_per_minute=10, tokens_per_minute=100), time.monotonic()
        held = await one.open(limited, 90)
        for _ in range(5):
            assert not await two.admits(limited, 90)
        await until(lambda: two.left(limited) >= 9)
        assert not await one.admits(limited, 90)
        held.close()
        await until(lambda: one.left(limited) >= 9)
        assert one.left(limited) <= 9 + refill(10, began)

    run(scenario)


@pytest.mark.usefixtures("patient")
def test_parallel_requests_are_those_of_all_servers(database: Database) -> None:
    async def scenario() -> None:
        servers, limited = [Server(database), Server(database)], key(parallel_requests=3)
        held = [await servers[number % 2].open(limited) for number in range(3)]
        for each in servers:
            with pytest.raises(RateLimited, match="parallel requests: limit 3, running 3"):
                await each.open(limited)
        waiting = [asyncio.ensure_future(each.admits(limited)) for each in servers]
        await asyncio.sleep(0)
        held.pop().close()
        assert any(await asyncio.gather(*waiting)), "asked again"
        for meter in held:
            meter.close()
        for number in range(40):  # one after the other: none may be refused because of one that has ended elsewhere
            assert await servers[number % 2].admits(key("one", parallel_requests=1))
            assert await servers[number % 2].admits(key("two", parallel_requests=2))

    run(scenario)


@pytest.mark.usefixtures("patient")
def test_a_flood_never_has_more_parallel_requests_than_the_limit(database: Database) -> None:
    async def scenario() -> None:
        servers, limited = [Server(database) for _ in range(3)], key(parallel_requests=4)
        running, most, served = 0, 0, 0

        async def ask(number: int) -> None:
            nonlocal running, most, served
            while served <= 40:
                with suppress(RateLimited):
                    meter = await servers[number % 3].open(limited)
                    running += 1
                    most, served = max(most, running), served + 1
                    await asyncio.sleep(0.01)
                    running -= 1
                    meter.close()

        await asyncio.gather(*(ask(number) for number in range(9)))
        assert most <= 4

    run(scenario)


@pytest.mark.usefixtures("patient")
def test_a_server_that_dies_gives_its_parallel_requests_back(database: Database) -> None:
    async def scenario() -> None:
        dead, alive, limited = Server(database), Server(database), key(parallel_requests=2)
        for _ in range(2):
            await dead.open(limited)
        assert dead.ledger.shared is not None
        assert dead.ledger.shared._task is not None
        dead.ledger.shared._task.cancel()
        assert not await alive.admits(limited)
        with database.adding() as connection:  # as if it had been silent for that long
            connection.execute(update(limit_holders).values(until=limit_holders.c.until - int(2 * PATIENCE * MICRO)))
        assert await alive.admits(limited)

    run(scenario)


@pytest.mark.usefixtures("patient")
def test_a_server_that_ends_gives_them_back_at_once(database: Database) -> None:
    async def scenario() -> None:
        ending, staying, limited = Server(database), Server(database), key(parallel_requests=1)
        await ending.open(limited)
        await asyncio.to_thread(ending.ledger.close)
        assert await staying.admits(limited)

    run(scenario)


@pytest.mark.usefixtures("exact")
def test_a_client_that_leaves_while_its_request_waits_uses_nothing(database: Database) -> None:
    async def scenario() -> None:
        one, limited = Server(database), key(requests_per_minute=60, parallel_requests=5, tokens_per_minute=120)
        for number in range(20):
            asking = asyncio.ensure_future(one.open(limited, 100))
            await asyncio.sleep(0.004 * number)
            if asking.cancel():
                with suppress(asyncio.CancelledError):
                    (await asking).close()
            else:
                asking.result().close()
        assert one.ledger.shared is not None
        share = one.ledger.shared._shares["k"]
        await until(lambda: not share.pending)
        assert (share.running, share.claimed, share.asking) == (0, 0, 0)
        row = one.table.exchange("x", [Ask("k", limited.limits)])[0]
        assert row.tokens == pytest.approx(120, abs=1)
        assert row.requests is not None
        assert 60 - one.entered <= row.requests + 0.1, "one that was admitted counts, even if its client leaves then"

    run(scenario)


@pytest.mark.usefixtures("exact")
def test_while_the_database_does_not_answer_each_server_counts_alone(database: Database) -> None:
    def gone() -> None:
        raise RegistryUnavailable("gone")

    async def scenario() -> None:
        one, two, limited = Server(database), Server(database), key(requests_per_minute=6, parallel_requests=2)
        began = time.monotonic()
        assert await one.admits(limited)
        one.table.fault = two.table.fault = gone
        for each, most in ((one, 5), (two, 6)):
            admitted = [await each.admits(limited) for _ in range(8)]
            assert all(admitted[:most])
            assert sum(admitted) <= most + refill(6, began)
        one.table.fault = two.table.fault = lambda: None
        shared = [each.ledger.shared for each in (one, two)]
        await until(lambda: not any(each is None or each._failing for each in shared))
        admitted = [await each.admits(limited) for _ in range(8) for each in (one, two)]
        assert 5 <= sum(admitted) <= 5 + refill(6, began), "they count together again"

    run(scenario)


def test_a_slow_database_holds_no_request_for_ever(database: Database) -> None:
    answer = threading.Event()

    async def scenario() -> None:
        one, limited = Server(database), key(requests_per_minute=60)
        one.table.fault = lambda: bool(answer.wait()) or None
        try:
            async with asyncio.timeout(PATIENCE):
                assert all(await asyncio.gather(*(one.admits(limited) for _ in range(5))))
        finally:
            answer.set()  # the loop waits for its threads when it ends

    run(scenario)


@pytest.mark.usefixtures("patient")
def test_nothing_is_remembered_of_keys_that_ask_no_more(database: Database) -> None:
    async def scenario() -> None:
        one = Server(database)
        for number in range(5):
            assert await one.admits(key(f"k{number}", requests_per_minute=60, parallel_requests=2))
        shared = one.ledger.shared
        assert shared is not None
        await until(lambda: not len(shared) and shared._task is None)
        assert await one.admits(key("k0", requests_per_minute=60))
        assert AHEAD_SECONDS > EXCHANGE_SECONDS

    run(scenario)
