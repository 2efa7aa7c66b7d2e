"""LimitTable: what keys use of their limits on all servers that share a database, and the rule who gets what is left.

A server asks for many requests of many keys in one transaction. It locks the rows of the keys, so the servers take
turns, and the clock is the database's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from sqlalchemy import BigInteger, ColumnElement, Connection, Row, bindparam, cast, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert

from adapters.registry.database import Database
from adapters.registry.schema import limit_buckets, limit_holders
from server.access.key import KeyLimits
from server.access.limits import Bucket, PerMinute

HOLD_SECONDS = 15.0
"""Seconds after which the parallel requests of a server that no longer renews them are free: it has died."""
MICRO = 1_000_000


@dataclass(frozen=True, slots=True)
class Want:
    """What one request needs. It gets all of it or nothing."""

    requests: int = 0
    tokens: float = 0.0
    least: float = 0.0
    """Tokens that must be left for it: fewer than ``tokens`` if those are more than the limit."""
    place: bool = False
    """Whether it needs one of the key's parallel requests."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What a server asks for one key."""

    key: str
    limits: KeyLimits
    wants: Sequence[Want] = ()
    """Served in this order."""
    unused_requests: float = 0.0
    """Given back; less than 0 if more was used than was taken."""
    unused_tokens: float = 0.0
    places: int | None = 0
    """Parallel requests that the server may have already. None: it has none, and the key may have any number."""
    recent_requests: float = 0.0
    """What the key, if it is busy, has used here in the last second. As much is taken ahead, if there is plenty."""
    recent_tokens: float = 0.0


class Refusal(NamedTuple):
    """Why a want gets nothing."""

    limit: PerMinute | Literal["parallel_requests"]
    there: float
    """What is left; or how many requests run on all servers."""
    needed: float
    wait: float
    """Seconds until that is there."""


@dataclass(slots=True)
class Answer:
    """What a server gets for one key."""

    claimed: int
    """Parallel requests that it may now have."""
    others: int
    """Those that other servers may have."""
    refusals: list[Refusal | None] = field(default_factory=list)
    """For each want; None if it gets what it needs."""
    requests: float | None = None
    """What is left on all servers after this, without what anybody has taken ahead; None without such a limit."""
    tokens: float | None = None
    ahead_requests: float = 0.0
    """What it may use besides, for requests that come soon."""
    ahead_tokens: float = 0.0


def decide(ask: Ask, requests: Bucket | None, tokens: Bucket | None, others: int, now: float) -> Answer:
    """Serve an ask from the buckets of its key, of which other servers have ``others`` parallel requests."""
    answer = Answer(ask.places or 0, others)
    for bucket, unused in ((requests, ask.unused_requests), (tokens, ask.unused_tokens)):
        if bucket is not None and unused:
            bucket.take(-unused, now)
    for want in ask.wants:
        refusal = _refusal(want, ask.limits, requests, tokens, answer.claimed + others, now)
        answer.refusals.append(refusal)
        if refusal is None:
            answer.claimed += want.place
            if requests is not None:
                requests.take(want.requests, now)
            if tokens is not None:
                tokens.take(want.tokens, now)
    served = [want for want, refusal in zip(ask.wants, answer.refusals, strict=True) if refusal is None]
    if requests is not None and any(want.requests for want in served):
        answer.ahead_requests = _take_ahead(requests, ask.recent_requests, now)
    if tokens is not None and any(want.tokens for want in served):
        answer.ahead_tokens = _take_ahead(tokens, ask.recent_tokens, now)
    answer.requests = None if requests is None else requests.level(now)
    answer.tokens = None if tokens is None else tokens.level(now)
    return answer


def _refusal(
    want: Want, limits: KeyLimits, requests: Bucket | None, tokens: Bucket | None, running: int, now: float
) -> Refusal | None:
    parallel = limits.parallel_requests
    if want.place and parallel is not None and running >= parallel:
        return Refusal("parallel_requests", running, 1, 0.0)
    if want.requests and requests is not None and (wait := requests.wait(want.requests, now)):
        return Refusal("requests_per_minute", requests.level(now), want.requests, wait)
    if want.tokens and tokens is not None and (wait := tokens.wait(want.least, now)):
        return Refusal("tokens_per_minute", tokens.level(now), want.least, wait)
    return None


def _take_ahead(bucket: Bucket, recent: float, now: float) -> float:
    """Take as much as was lately used, but leave half of what there is to the other servers."""
    ahead = float(max(min(recent, bucket.level(now) / 2) // 1, 0))
    bucket.take(ahead, now)
    return ahead


class LimitTable:
    """The limits in a PostgreSQL database. Any thread may call any method.

    Methods raise RegistryUnavailable or StoreFull.
    """

    def __init__(self, database: Database, hold_seconds: float = HOLD_SECONDS) -> None:
        self._database = database
        self._until = _NOW + int(hold_seconds * MICRO)

    def exchange(self, server: str, asks: Sequence[Ask]) -> list[Answer]:
        """Serve the asks of a server, at most one for each key, in one transaction."""
        keys = sorted(ask.key for ask in asks)
        with self._database.adding() as connection:
            rows = _locked(connection, keys)
            if len(rows) == len(keys):
                return self._serve(connection, server, asks, rows)
        # In a transaction of its own: a server that added rows while it has locks could wait for one that waits for it.
        with self._database.adding() as connection:
            # As of now, or History might delete them at once.
            query = insert(limit_buckets).values(key=bindparam("key"), requests=0.0, tokens=0.0, at=_NOW)
            connection.execute(query.on_conflict_do_nothing(), [{"key": key} for key in keys if key not in rows])
        with self._database.adding() as connection:
            return self._serve(connection, server, asks, _locked(connection, keys))

    def renew(self, server: str) -> int:
        """Keep the parallel requests of a server; delete those of servers that have died. Return the number of keys."""
        table = limit_holders
        with self._database.adding() as connection:
            kept = connection.execute(update(table).where(table.c.server == server).values(until=self._until)).rowcount
            connection.execute(delete(table).where(table.c.until < _NOW))
            return kept

    def leave(self, server: str) -> None:
        """Free the parallel requests of a server that ends."""
        with self._database.adding() as connection:
            connection.execute(delete(limit_holders).where(limit_holders.c.server == server))

    def _serve(
        self, connection: Connection, server: str, asks: Sequence[Ask], rows: Mapping[str, Row[Any]]
    ) -> list[Answer]:
        """Decide, and write what comes of it. The rows are locked."""
        others = _held_by_others(connection, server, [ask.key for ask in asks if ask.places is not None])
        answers: list[Answer] = []
        buckets: list[dict[str, Any]] = []
        for ask in asks:
            row = rows[ask.key]
            at = max(row.now, row.at)
            now, before = at / MICRO, row.at / MICRO
            requests = _bucket(ask.limits.requests_per_minute, before, row.requests)
            tokens = _bucket(ask.limits.tokens_per_minute, before, row.tokens)
            answers.append(decide(ask, requests, tokens, others.get(ask.key, 0), now))
            used = {"requests": _used(requests, now), "tokens": _used(tokens, now)}
            buckets.append({"_key": ask.key, **used, "at": at})
        where = limit_buckets.c.key == bindparam("_key")
        columns: dict[str, Any] = {name: bindparam(name) for name in ("requests", "tokens", "at")}
        connection.execute(update(limit_buckets).where(where).values(columns), buckets)
        _hold(connection, server, asks, answers, self._until)
        return answers


_NOW = cast(func.extract("epoch", func.clock_timestamp()) * MICRO, BigInteger)
"""The database's clock, in microseconds."""


def _locked(connection: Connection, keys: Sequence[str]) -> dict[str, Row[Any]]:
    """Lock the rows of keys, in order, so that no two servers wait for each other; return those that there are."""
    # What a crash of the database may lose is a moment of counts, which are gone in a minute anyway.
    connection.exec_driver_sql("SET LOCAL synchronous_commit TO off")
    table = limit_buckets
    query = select(table, _NOW.label("now")).where(table.c.key.in_(keys)).order_by(table.c.key).with_for_update()
    return {row.key: row for row in connection.execute(query)}


def _held_by_others(connection: Connection, server: str, keys: Sequence[str]) -> dict[str, int]:
    """Return the parallel requests of keys on other servers."""
    if not keys:
        return {}
    table = limit_holders
    alive = (table.c.server != server) & (table.c.until >= _NOW)
    query = select(table.c.key, func.sum(table.c.running)).where(table.c.key.in_(keys), alive).group_by(table.c.key)
    return {key: int(running) for key, running in connection.execute(query)}


def _hold(
    connection: Connection, server: str, asks: Sequence[Ask], answers: Sequence[Answer], until: ColumnElement[int]
) -> None:
    """Write how many parallel requests the server may have."""
    table, held, free = limit_holders, [], []
    for ask, answer in zip(asks, answers, strict=True):
        if ask.places is None:
            continue
        if answer.claimed:
            held.append({"key": ask.key, "server": server, "running": answer.claimed})
        else:
            free.append(ask.key)
    if held:
        query = insert(table).values(
            key=bindparam("key"), server=bindparam("server"), running=bindparam("running"), until=until
        )
        excluded = query.excluded
        query = query.on_conflict_do_update(
            index_elements=["key", "server"], set_={"running": excluded.running, "until": excluded.until}
        )
        connection.execute(query, held)
    if free:
        connection.execute(delete(table).where(table.c.server == server, table.c.key.in_(free)))


def _bucket(capacity: int | None, at: float, used: float) -> Bucket | None:
    return None if capacity is None else Bucket(capacity, at, used)


def _used(bucket: Bucket | None, now: float) -> float:
    """What is used, whatever the limit, which may change."""
    return 0.0 if bucket is None else bucket.capacity - bucket.level(now)
