"""UsageLedger and UsageTable, over SQLite and PostgreSQL, by clocks that the tests turn."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.errors import RegistryUnavailable
from adapters.registry import audit
from adapters.registry.database import Database, open_postgres, open_sqlite
from server.access import usage
from server.access.key import ApiKey, KeyLimits
from server.access.usage import OTHER, Meter, UsageLedger
from server.access.usage_table import Batch, Counts, Place, Tokens, UsageFilter, UsageTable
from server.errors import QuotaUsedUp, RateLimited
from tests.postgres import Postgres, postgres

ALWAYS = UsageFilter(date(2000, 1, 1), date(2100, 1, 1))
DAY = date(2026, 11, 30)
ALL = ("day", "key", "adapter")


@dataclass
class Clock:
    """Both clocks of a ledger."""

    now: datetime = field(default_factory=lambda: datetime(2026, 11, 30, 23, 59, 50, tzinfo=UTC))
    steady: float = 0.0

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)
        self.steady += seconds


@dataclass
class Work:
    """What a request has computed, as the test says."""

    tokens: Tokens = field(default_factory=Tokens)

    def __call__(self) -> Tokens:
        return self.tokens


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    if request.param == "sqlite":
        opened = open_sqlite(tmp_path / "registry.sqlite3")
    else:
        opened = open_postgres(request.getfixturevalue("server").fresh())
    yield opened
    opened.close()


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Database]:
    opened = open_sqlite(tmp_path / "registry.sqlite3")
    yield opened
    opened.close()


def ledger(database: Database, clock: Clock, table: UsageTable | None = None) -> UsageLedger:
    return UsageLedger(table or UsageTable(database), lambda: clock.steady, clock)


def key(id_: str = "k", **limits: int) -> ApiKey:
    return ApiKey(id_, id_, frozenset({"infer"}), limits=KeyLimits(**limits))


def ask(ledger: UsageLedger, key: ApiKey, adapter: str, tokens: Tokens) -> None:
    """Serve a whole request."""
    meter = begin(ledger, key, adapter, Work(tokens))
    meter.close()


def begin(ledger: UsageLedger, key: ApiKey, adapter: str, work: Work) -> Meter:
    if not ledger.prepared(key):
        ledger.prepare(key)
    meter = ledger.open(key)
    meter.begin(adapter, work)
    return meter


def rows(database: Database, by: Any = ALL, wanted: UsageFilter = ALWAYS) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in UsageTable(database).read(wanted, by, None, 1000)]


def test_requests_are_summed_by_key_adapter_and_day(database: Database) -> None:
    clock = Clock()
    counts = ledger(database, clock)
    for _ in range(3):
        ask(counts, key(), "red@1", Tokens(10, 4, 5))
    ask(counts, key("other"), "", Tokens(1, 0, 1))
    counts.flush()
    ask(counts, key(), "red@1", Tokens(10, 4, 5))
    clock.advance(20)
    ask(counts, key(), "red@1", Tokens(7, 0, 0))
    counts.flush()
    assert rows(database) == [
        (DAY, "k", "red@1", 4, 40, 16, 20),
        (DAY, "other", "", 1, 1, 0, 1),
        (date(2026, 12, 1), "k", "red@1", 1, 7, 0, 0),
    ]
    assert rows(database, ("key",)) == [("k", 5, 47, 16, 20), ("other", 1, 1, 0, 1)]
    assert rows(database, ("adapter",), UsageFilter(DAY, DAY)) == [("", 1, 1, 0, 1), ("red@1", 4, 40, 16, 20)]
    table = UsageTable(database)
    assert table.month_tokens(["k", "other", "nobody"], date(2026, 11, 1)) == {"k": 60, "other": 2}
    assert table.month_tokens(["k"], date(2026, 12, 1)) == {"k": 7}


def test_adapters_are_found_alone_and_in_mixes(database: Database) -> None:
    counts = ledger(database, Clock())
    for adapter in ("", "red@1", "red@2", "Red@1", "red/blue@1", "green@1+red@1", "green@1+red@12+tan@3"):
        ask(counts, key(), adapter, Tokens(1))
    counts.flush()

    def found(adapter: str) -> list[Any]:
        wanted = UsageFilter(ALWAYS.start, ALWAYS.end, adapter=adapter)
        return sorted(row[0] for row in rows(database, ("adapter",), wanted))

    assert found("red@1") == ["green@1+red@1", "red@1"]
    assert found("red") == ["green@1+red@1", "green@1+red@12+tan@3", "red@1", "red@2"]
    assert found("green@1") == ["green@1+red@1", "green@1+red@12+tan@3"]
    assert found("") == [""]
    assert found("ed") == found("%") == found("re\0d") == []


def test_pages_follow_each_other(database: Database) -> None:
    counts = ledger(database, Clock())
    for number in range(7):
        ask(counts, key(f"k{number % 2}"), f"team/a{number}@1", Tokens(1))
    counts.flush()
    table, whole = UsageTable(database), rows(database)
    pages, after = [], None
    while page := table.read(ALWAYS, ALL, after, 3):
        pages += [tuple(row) for row in page]
        after = list(page[-1][:3])
    assert pages == whole
    assert len(whole) == 7


def test_a_request_that_runs_is_counted_as_far_as_it_has_come(sqlite: Database) -> None:
    clock = Clock()
    counts, work = ledger(sqlite, clock), Work()
    meter = begin(counts, key(), "red@1", work)
    counts.flush()
    assert rows(sqlite) == [(DAY, "k", "red@1", 1, 0, 0, 0)]
    work.tokens = Tokens(8, 2, 0)
    counts.flush()
    counts.flush()
    work.tokens = Tokens(3, 2, 5)  # preempted: its prompt is computed again
    counts.flush()
    clock.advance(20)
    work.tokens = Tokens(10, 2, 9)
    meter.end()
    work.tokens = Tokens(99, 99, 99)  # after its end
    meter.close()
    counts.flush()
    assert rows(sqlite) == [(DAY, "k", "red@1", 1, 8, 2, 5), (date(2026, 12, 1), "k", "red@1", 0, 2, 0, 4)]


def test_a_request_that_never_began_is_not_counted(sqlite: Database) -> None:
    counts = ledger(sqlite, Clock())
    counts.open(key()).close()
    counts.flush()
    assert rows(sqlite) == []


class Outage(UsageTable):
    """A table whose database fails: before it has written a batch, or before it has said so."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self.before = self.after = False

    def write(self, writer: str, number: int, batch: Batch) -> None:
        if self.before:
            raise RegistryUnavailable("gone")
        super().write(writer, number, batch)
        if self.after:
            raise RegistryUnavailable("gone before it said so")


@given(st.lists(st.sampled_from(["ok", "before", "after", "ask"]), max_size=20))
@settings(max_examples=25, deadline=None)
def test_an_outage_loses_nothing_and_counts_nothing_twice(tmp_path_factory: Any, steps: list[str]) -> None:
    database = open_sqlite(tmp_path_factory.mktemp("outage") / "registry.sqlite3")
    table = Outage(database)
    counts, asked, work = ledger(database, Clock(), table), 0, Work()
    running = begin(counts, key(), "green@1", work)
    for step in steps:
        if step == "ask":
            ask(counts, key(), "red@1", Tokens(3, 1, 2))
            work.tokens = Tokens(5, 0, work.tokens.output + 1)
            asked += 1
            continue
        table.before, table.after = step == "before", step == "after"
        try:
            counts.flush()
        except RegistryUnavailable:
            assert step != "ok"
    table.before = table.after = False
    running.close()
    counts.close()
    red = [(DAY, "k", "red@1", asked, 3 * asked, asked, 2 * asked)] if asked else []
    assert rows(database) == [(DAY, "k", "green@1", 1, 5 if asked else 0, 0, asked), *red]
    assert UsageTable(database).month_tokens(["k"], date(2026, 11, 1)).get("k", 0) == 6 * asked + (5 if asked else 0)
    database.close()


def test_counts_in_memory_are_bounded(sqlite: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "MAX_PLACES", 10)
    counts = ledger(sqlite, Clock())
    for number in range(100):
        ask(counts, key(), f"a{number}@1", Tokens(1))
    assert len(counts._counts) == 11
    counts.flush()
    assert rows(sqlite, ("key",)) == [("k", 100, 100, 0, 0)]
    assert (DAY, "k", OTHER, 90, 90, 0, 0) in rows(sqlite)


def test_what_cannot_be_written_at_the_end_is_in_the_log(sqlite: Database, caplog: pytest.LogCaptureFixture) -> None:
    table = Outage(sqlite)
    counts = ledger(sqlite, Clock(), table)
    ask(counts, key(), "red@1", Tokens(3, 1, 2))
    table.before = True
    counts.close()
    assert "is lost: gone" in caplog.text
    assert "adapter='red@1'" in caplog.text


def test_two_servers_add_up(database: Database) -> None:
    clock = Clock()
    pair = [ledger(database, clock) for _ in range(2)]

    def work(counts: UsageLedger) -> None:
        for number in range(30):
            ask(counts, key(), f"a{number % 3}@1", Tokens(2, 1, 3))
            counts.flush()

    threads = [threading.Thread(target=work, args=(counts,)) for counts in pair]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rows(database, ("key",)) == [("k", 60, 120, 60, 180)]


def test_a_budget_is_shared_and_begins_anew_each_month(database: Database) -> None:
    clock = Clock()
    one, two = ledger(database, clock), ledger(database, clock)
    budget = key(tokens_per_month=100)
    ask(one, budget, "", Tokens(30, 0, 30))
    assert one.spent("k") == 60, "before it is written"
    ask(two, budget, "", Tokens(30, 0, 10))
    for counts in (one, two):
        counts.flush()
    for counts in (one, two):
        counts._read_months()
        assert counts.spent("k") == 100
        with pytest.raises(QuotaUsedUp, match="100 of 100") as caught:
            counts.open(budget)
        assert caught.value.retry_after == pytest.approx(10)
    assert not ledger(database, clock).prepared(budget), "a server that has just started must read it first"
    clock.advance(10)
    assert not one.prepared(budget)
    ask(one, budget, "", Tokens(1))
    assert one.spent("k") == 1
    two._read_months()
    assert two.spent("k") == 0, "not written yet"
    one.flush()
    two._read_months()
    assert two.spent("k") == 1


def test_running_requests_are_not_counted_twice_against_a_budget(sqlite: Database) -> None:
    clock = Clock()
    counts, work = ledger(sqlite, clock), Work()
    budget = key(tokens_per_month=80)
    meter = begin(counts, budget, "", work)
    asyncio.run(meter.reserve(20, 1, 60))
    work.tokens = Tokens(20, 0, 40)
    counts.flush()
    counts._read_months()
    assert counts.spent("k") == 0
    with pytest.raises(RateLimited, match="used 0, reserved by running requests 80"):
        asyncio.run(counts.open(budget).reserve(1, 1, 1))
    meter.close()
    assert counts.spent("k") == 60
    clock.advance(10)
    other = begin(counts, budget, "", Work(Tokens(5, 0, 5)))
    counts.flush()
    assert counts.spent("k") == 0
    other.close()
    assert counts.spent("k") == 10


def test_keys_that_ask_no_more_are_not_followed(sqlite: Database) -> None:
    clock = Clock(now=datetime(2026, 11, 2, tzinfo=UTC))
    counts = ledger(sqlite, clock)
    budget = key(tokens_per_month=100)
    ask(counts, budget, "", Tokens(10))
    counts.flush()
    clock.advance(usage.FORGET_SECONDS + 1)
    counts._read_months()
    assert not counts.prepared(budget)
    ask(counts, budget, "", Tokens(1))
    assert counts.spent("k") == 11


def test_keys_whose_budget_cannot_be_read_are_forgotten(sqlite: Database) -> None:
    """They asked while the database was away, and never again: each would stay for ever."""
    clock = Clock()
    counts = ledger(sqlite, clock)
    for number in range(3):
        assert not counts.prepared(key(f"k{number}", tokens_per_month=100))
    assert len(counts._asked) == 3
    clock.advance(usage.FORGET_SECONDS + 1)
    counts._read_months()
    assert not counts._asked


@contextmanager
def started(counts: UsageLedger) -> Iterator[None]:
    counts.start()
    try:
        yield
    finally:
        counts.close()


def test_the_thread_writes_and_a_server_that_ends_leaves_no_writer(sqlite: Database) -> None:
    counts, done = ledger(sqlite, Clock()), threading.Event()
    with started(counts):
        ask(counts, key(), "red@1", Tokens(1))
        for _ in range(100):
            if rows(sqlite):
                break
            done.wait(0.05)
        assert rows(sqlite) == [(DAY, "k", "red@1", 1, 1, 0, 0)]
        ask(counts, key(), "red@1", Tokens(1))
    assert rows(sqlite) == [(DAY, "k", "red@1", 2, 2, 0, 0)]
    with sqlite.reading() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM usage_writers").scalar_one() == 0


def test_a_batch_is_written_once(database: Database) -> None:
    table, batch = UsageTable(database), {Place("k", "", DAY): Counts(1, 2, 0, 3)}
    for number in (1, 1, 2, 1, 2):
        table.write("w", number, batch)
    table.write("v", 1, batch)
    assert rows(database) == [(DAY, "k", "", 3, 6, 0, 9)]


def test_questions_may_have_any_text(database: Database) -> None:
    """PostgreSQL cannot store a NUL."""
    odd = UsageFilter(ALWAYS.start, ALWAYS.end, "k\0", "red\0")
    assert UsageTable(database).read(odd, ALL, [DAY, "\0", "\0"], 10) == []
    assert audit.read(database, audit.AuditFilter(key="\0", name="\0"), None, 10) == []
