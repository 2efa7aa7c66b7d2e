"""UsageTable: what keys have used, in the registry's database, which servers share. Each method is one transaction."""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal, NamedTuple

from sqlalchemy import ColumnElement, Connection, Insert, Label, Row, Table, delete, func, literal, select, tuple_
from sqlalchemy.dialects import postgresql, sqlite

from adapters.registry.database import Database, storable
from adapters.registry.schema import usage, usage_months, usage_writers

Dimension = Literal["day", "key", "adapter"]
DIMENSIONS: tuple[Dimension, ...] = ("day", "key", "adapter")
"""What usage can be grouped by, in the order of a list."""
FORGET_WRITERS = 7 * 24 * 3600
"""Seconds after which the row of a server that has not written any more is deleted: it has died."""


class Place(NamedTuple):
    """What a count is for."""

    key: str
    adapter: str
    """As in ``legal@2``; versions in alphabetical order, joined by ``+``, for a mix; empty for the base alone."""
    day: date
    """UTC."""


class Tokens(NamedTuple):
    """Tokens of a request, or of many."""

    prompt: int = 0
    cached: int = 0
    """Of the prompt, from the prefix cache."""
    output: int = 0


@dataclass(slots=True)
class Counts:
    """Requests and their tokens."""

    requests: int = 0
    prompt: int = 0
    cached: int = 0
    output: int = 0

    def add(self, requests: int, tokens: Tokens) -> None:
        """Add requests and their tokens."""
        self.requests += requests
        self.prompt += tokens.prompt
        self.cached += tokens.cached
        self.output += tokens.output

    @property
    def tokens(self) -> int:
        """Tokens of prompts and answers."""
        return self.prompt + self.output


Batch = Mapping[Place, Counts]


@dataclass(frozen=True, slots=True)
class UsageFilter:
    """Which usage to read. None: all."""

    start: date
    end: date
    """The last day, included."""
    key: str | None = None
    adapter: str | None = None
    """A version, or a name for all its versions; mixes that contain it count, too. Empty: the base alone."""


class UsageTable:
    """Increments to usage, and queries of it. Methods raise RegistryUnavailable or StoreFull."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def write(self, writer: str, number: int, batch: Batch) -> None:
        """Add a batch, unless ``writer`` has written a batch of this number or a higher one.

        So a batch can be given again if it is not known whether it was written.
        """
        # In one order on all servers, so that none waits for another that waits for it.
        rows = [(place, batch[place]) for place in sorted(batch)]
        months: dict[tuple[str, date], int] = {}
        for place, counts in rows:
            month = place.key, place.day.replace(day=1)
            months[month] = months.get(month, 0) + counts.tokens
        with self._database.adding() as connection:
            if not self._claim(connection, writer, number):
                return
            connection.execute(
                self._increment(usage, "requests", "prompt_tokens", "cached_tokens", "output_tokens"),
                [{**place._asdict(), **_columns(counts)} for place, counts in rows],
            )
            connection.execute(
                self._increment(usage_months, "tokens"),
                [{"key": key, "month": month, "tokens": tokens} for (key, month), tokens in sorted(months.items())],
            )

    def forget(self, writer: str) -> None:
        """Delete the row of a server that ends, and those of servers that died long ago."""
        late = usage_writers.c.at < int(time.time()) - FORGET_WRITERS
        with self._database.adding() as connection:
            connection.execute(delete(usage_writers).where((usage_writers.c.id == writer) | late))

    def month_tokens(self, keys: Collection[str], month: date) -> dict[str, int]:
        """Return the tokens of some keys in a month, given by its first day. Keys that have used none are missing."""
        table = usage_months
        query = select(table.c.key, table.c.tokens).where(table.c.month == month, table.c.key.in_(sorted(keys)))
        with self._database.reading() as connection:
            return {row.key: row.tokens for row in connection.execute(query)}

    def read(
        self, wanted: UsageFilter, by: Sequence[Dimension], after: Sequence[Any] | None, count: int
    ) -> Sequence[Row[Any]]:
        """Return up to ``count`` sums, ordered by the columns of ``by``. ``after``: the values of the last row seen."""
        columns = [usage.c[name] for name in by]
        query = select(*columns, *_sums()).where(usage.c.day >= wanted.start, usage.c.day <= wanted.end)
        if wanted.key is not None:
            query = query.where(usage.c.key == storable(wanted.key))
        if wanted.adapter is not None:
            query = query.where(self._has(storable(wanted.adapter)))
        if columns:
            query = query.group_by(*columns).order_by(*columns)
            if after is not None:
                place = [storable(value) if isinstance(value, str) else value for value in after]
                query = query.where(tuple_(*columns) > tuple_(*place))
        with self._database.reading() as connection:
            return connection.execute(query.limit(count)).all()

    def _claim(self, connection: Connection, writer: str, number: int) -> bool:
        """Note that a batch is being written; return False if it has been already."""
        query = self._insert(usage_writers).values(id=writer, batch=number, at=int(time.time()))
        query = query.on_conflict_do_update(
            index_elements=["id"],
            set_={"batch": query.excluded.batch, "at": query.excluded.at},
            where=usage_writers.c.batch < query.excluded.batch,
        )
        return connection.execute(query.returning(usage_writers.c.batch)).first() is not None

    def _has(self, adapter: str) -> ColumnElement[bool]:
        """The condition that ``adapter`` takes part in a row. Not LIKE, which ignores case in SQLite."""
        if not adapter:
            return usage.c.adapter == ""
        position = func.strpos if self._database.shared else func.instr
        part = f"+{adapter}+" if "@" in adapter else f"+{adapter}@"
        return position(literal("+") + usage.c.adapter + "+", part) > 0

    def _increment(self, table: Table, *columns: str) -> Insert:
        query = self._insert(table)
        sums = {name: table.c[name] + query.excluded[name] for name in columns}
        return query.on_conflict_do_update(index_elements=list(table.primary_key.columns), set_=sums)

    def _insert(self, table: Table) -> postgresql.Insert | sqlite.Insert:
        return postgresql.insert(table) if self._database.shared else sqlite.insert(table)


def _columns(counts: Counts) -> dict[str, int]:
    return {
        "requests": counts.requests,
        "prompt_tokens": counts.prompt,
        "cached_tokens": counts.cached,
        "output_tokens": counts.output,
    }


def _sums() -> list[Label[Any]]:
    names = ("requests", "prompt_tokens", "cached_tokens", "output_tokens")
    return [func.coalesce(func.sum(usage.c[name]), 0).label(name) for name in names]
