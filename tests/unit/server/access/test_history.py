"""History over SQLite and PostgreSQL: what is old is deleted, and nothing else."""

import logging
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, func, select, update

from adapters.registry import audit
from adapters.registry.audit import AuditFilter
from adapters.registry.database import Database
from adapters.registry.schema import api_keys, limit_buckets, usage, usage_months
from server.access import history
from server.access.history import History
from server.access.key import KeyLimits
from server.access.key_spec import KeySpec
from server.access.key_store import KeyStore
from server.access.limit_table import Ask, LimitTable, Want
from server.access.usage_table import Counts, Place, UsageFilter, UsageTable
from server.database import open_database
from tests.postgres import Postgres, postgres

NOW = datetime(2026, 11, 30, 12, tzinfo=UTC)
ALWAYS = UsageFilter(date(2000, 1, 1), date(2100, 1, 1))


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    url = request.getfixturevalue("server").fresh() if request.param == "postgres" else None
    database = open_database(tmp_path, url)
    yield database
    database.close()


def shorten(database: Database, days: int) -> None:
    History(database, days, lambda: NOW).shorten()


def note(database: Database, days_ago: float, name: str) -> None:
    with database.adding() as connection:
        at = int((NOW - timedelta(days=days_ago)).timestamp() * 1e6)
        audit.write(connection, at, audit.SERVER, "adapter.removed", name, {})


def entries(database: Database) -> list[str]:
    return sorted(row.name for row in audit.read(database, AuditFilter(), None, 100_000))


def revoked(database: Database, store: KeyStore, name: str, days_ago: float) -> str:
    """Make a key that was revoked so long ago; return its id."""
    id_ = store.add(KeySpec(name=name))[0].key.id
    store.revoke(id_)
    with database.adding() as connection:
        at = int((NOW - timedelta(days=days_ago)).timestamp())
        connection.execute(update(api_keys).where(api_keys.c.id == id_).values(revoked=at, created=at - 1))
    return id_


def count(database: Database, table: Any) -> int:
    with database.reading() as connection:
        found: int = connection.execute(select(func.count()).select_from(table)).scalar_one()
        return found


def test_old_entries_of_the_audit_log_are_deleted_in_parts(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(history, "ROWS", 3)
    for number in range(7):
        note(database, 10 + number, f"old-{number}")
    note(database, 7.49, "the first kept day")
    note(database, 7.51, "the last deleted day")
    note(database, 0, "new")
    with caplog.at_level(logging.INFO):
        shorten(database, 7)
    assert entries(database) == ["new", "the first kept day"]
    assert "2026-11-23: 8 entries of the audit log" in caplog.text
    shorten(database, 7)
    assert len(entries(database)) == 2


def test_the_databases_clock_counts(database: Database) -> None:
    with database.adding() as connection:
        moment = database.now(connection)
        for days_ago in (0, 6, 9):
            audit.write(
                connection, moment - days_ago * 86_400_000_000, audit.SERVER, "adapter.removed", f"{days_ago}", {}
            )
    History(database, 7).shorten()
    assert entries(database) == ["0", "6"]


def test_a_clock_that_jumps_ahead_deletes_nothing_for_a_day(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """An operator can set it right before what should be kept is lost."""
    now, passed = [NOW], [0.0]
    kept = History(database, 7, lambda: now[0], lambda: passed[0])

    def look(days: float, hours: float) -> list[str]:
        """Look again ``hours`` later, when the clock has gone on by ``days``."""
        now[0] += timedelta(days=days)
        passed[0] += hours * 3600
        kept.shorten()
        return entries(database)

    note(database, 8, "old")
    note(database, 2, "new")
    assert look(0, 0) == ["new"], "at the start, the clock is believed"
    with caplog.at_level(logging.WARNING):
        assert look(3650, 0.2) == ["new"]
    assert "clock" in caplog.text
    assert look(-3650, 0.2) == ["new"], "set right"
    note(database, 8, "old")
    assert look(0, 23) == ["new", "old"]
    assert look(1, 24) == ["new"]
    assert look(30, 0.2) == ["new"], "this time it is meant"
    assert look(1, 24) == []


def test_old_usage_is_deleted_and_budgets_are_not(database: Database) -> None:
    table = UsageTable(database)
    days = [date(2026, 9, 30), date(2026, 10, 31), date(2026, 11, 1), date(2026, 11, 22), date(2026, 11, 23)]
    table.write("w", 1, {Place("key", adapter, day): Counts(1, 10) for day in days for adapter in ("a@1", "b@1")})
    shorten(database, 7)
    assert [row.day for row in table.read(ALWAYS, ("day",), None, 100)] == [date(2026, 11, 23)]
    assert table.month_tokens(["key"], date(2026, 11, 1)) == {"key": 60}, "the budget is of the whole month"
    assert count(database, usage_months) == 1


def test_usage_of_one_day_is_deleted_in_parts(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "ROWS", 3)
    table, old, kept = UsageTable(database), date(2026, 11, 22), date(2026, 11, 23)
    table.write("w", 1, {Place("key", f"a@{n}", day): Counts(1, 10) for day in (old, kept) for n in range(8)})
    parts: list[int] = []
    shorten_noting_parts(database, "usage", parts)
    assert parts == [3, 3, 2]
    assert [row.day for row in table.read(ALWAYS, ("day",), None, 100)] == [kept]
    assert count(database, usage) == 8


def shorten_noting_parts(database: Database, table: str, parts: list[int]) -> None:
    """Note how many rows of ``table`` each transaction deletes."""

    def begin(_: object) -> None:
        parts.append(0)

    def executed(_: object, cursor: Any, statement: str, *__: object) -> None:
        if statement.startswith(f"DELETE FROM {table} "):
            parts[-1] += cursor.rowcount

    engine = database._engine
    event.listen(engine, "begin", begin)
    event.listen(engine, "after_cursor_execute", executed)
    shorten(database, 7)
    parts[:] = [rows for rows in parts if rows]


def test_limits_of_keys_that_ask_no_more_are_forgotten(server: Postgres, tmp_path: Path) -> None:
    database = open_database(tmp_path, server.fresh())
    limits = KeyLimits(requests_per_minute=10, tokens_per_minute=100)
    table = LimitTable(database)
    table.exchange("server", [Ask(key, limits, [Want(4, 40, 40)]) for key in ("gone", "file:gone", "asks")])
    with database.adding() as connection:
        old = int((NOW - timedelta(days=7.51)).timestamp() * 1e6)
        is_gone = limit_buckets.c.key.in_(["gone", "file:gone"])
        connection.execute(update(limit_buckets).where(is_gone).values(at=old))
        recent = int((NOW - timedelta(days=7.49)).timestamp() * 1e6)
        connection.execute(update(limit_buckets).where(~is_gone).values(at=recent))
    shorten(database, 7)
    with database.reading() as connection:
        assert connection.execute(select(limit_buckets.c.key)).scalars().all() == ["asks"]
    answer = table.exchange("server", [Ask("gone", limits, [Want(4, 40, 40)])])[0]
    assert (answer.refusals, answer.requests, answer.tokens) == ([None], 6, 60), "it may ask again"
    database.close()


def test_keys_revoked_long_ago_are_deleted(database: Database) -> None:
    store = KeyStore(database)
    old = [revoked(database, store, f"old-{number}", 8) for number in range(3)]
    kept = [revoked(database, store, "lately", 6), store.add(KeySpec(name="valid"))[0].key.id]
    shorten(database, 7)
    assert sorted(each.key.id for each in KeyStore(database).stored(revoked=True)) == sorted(kept)
    assert not set(old) & set(kept)


def test_a_server_whose_keys_were_all_revoked_does_not_open_to_everybody(database: Database) -> None:
    store = KeyStore(database)
    for number in range(3):
        revoked(database, store, f"old-{number}", 30 - number)
    shorten(database, 1)
    (left,) = KeyStore(database).stored(revoked=True)
    assert left.key.name == "old-2"
    assert KeyStore(database).any
