"""History: what the database keeps of the past, and for how long: the audit log, usage by day, and revoked keys.
What a key has used of the limits of a minute goes when it has not been used for as long.

Of months, only the running one is needed, for budgets. Names of removed adapters stay, so that no version number comes
twice: about 100 bytes each.
"""

import logging
from collections.abc import Callable
from datetime import UTC, datetime, time, timedelta
from time import monotonic

from sqlalchemy import ColumnElement, Select, Table, delete, select, tuple_

from adapters.registry.database import Database
from adapters.registry.schema import api_keys, audit, limit_buckets, usage, usage_months
from server.follower import Follower

log = logging.getLogger(__name__)

LOOK_SECONDS = 600.0
"""Seconds between two looks for what is too old."""
ROWS = 2000
"""Rows that one transaction deletes: while it lasts, nobody else can write to SQLite."""
JUMP_SECONDS = 3600.0
"""By how much a clock that goes on by itself may get ahead between two looks."""
DOUBT_SECONDS = 86_400.0
"""For how long nothing is deleted after the clock has jumped ahead, so that somebody may set it right."""


class History:
    """Deletes what is older than ``days`` whole days (UTC), on a thread. Several servers may do so at once.

    Nothing for a day after the clock has jumped ahead: if it is wrong, what should be kept would be lost. Nobody can
    know that of the clock with which the server starts.
    """

    def __init__(
        self,
        database: Database,
        days: int,
        clock: Callable[[], datetime] | None = None,
        steady: Callable[[], float] = monotonic,
    ) -> None:
        """``clock``: the database's by default, which is the same for all servers. ``steady`` only goes forwards."""
        self._database = database
        self._days = days
        self._clock = clock or self._database_time
        self._steady = steady
        self._last: tuple[datetime, float] | None = None
        """What both clocks said at the last look."""
        self._doubt_until = 0.0
        """By ``steady``."""
        stale = "The database cannot be cleared of what is older than --history-days"
        self._follower = Follower("history", self.shorten, LOOK_SECONDS, stale, log)

    def start(self) -> None:
        """Start the thread."""
        self._follower.start()

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._follower.close()

    def shorten(self) -> None:
        """Delete what is too old. Raises RegistryUnavailable."""
        now = self._clock()
        if self._is_doubtful(now):
            return
        first = now.date() - timedelta(days=self._days)
        begin = int(datetime.combine(first, time(), UTC).timestamp())
        moment = begin * 1_000_000
        self._delete(usage_months, usage_months.c.month < first.replace(day=1))
        deleted = {
            "entries of the audit log": self._delete(audit, audit.c.at < moment),
            "rows of usage": self._delete(usage, usage.c.day < first),
            "revoked keys": self._delete(api_keys, (api_keys.c.revoked < begin) & api_keys.c.id.not_in(_newest_key())),
            # Whatever was used days ago is there again: a row that is missing says the same.
            "counts of limits": self._delete(limit_buckets, limit_buckets.c.at < moment),
        }
        if any(deleted.values()):
            said = ", ".join(f"{count} {what}" for what, count in deleted.items() if count)
            log.info("Deleted what was older than %s: %s", first, said)

    def _database_time(self) -> datetime:
        with self._database.reading() as connection:
            return datetime.fromtimestamp(self._database.now(connection) / 1e6, UTC)

    def _is_doubtful(self, now: datetime) -> bool:
        """Whether the clock, which says ``now``, has jumped ahead lately."""
        steady = self._steady()
        if self._last is not None:
            ahead = (now - self._last[0]).total_seconds() - (steady - self._last[1])
            if ahead > JUMP_SECONDS:
                self._doubt_until = steady + DOUBT_SECONDS
                log.warning(
                    "The clock has jumped ahead by %s, to %s: nothing is deleted for a day, in case that is wrong",
                    timedelta(seconds=round(ahead)),
                    now,
                )
        self._last = now, steady
        return steady < self._doubt_until

    def _delete(self, table: Table, old: ColumnElement[bool]) -> int:
        """Delete the rows of ``table`` that are ``old``, a part in each transaction; return their number."""
        columns = table.primary_key.columns
        some = select(*columns).where(old).limit(ROWS)
        # ``old`` once more, for rows that somebody changes between PostgreSQL's choice and the deletion.
        query = delete(table).where(tuple_(*columns).in_(some), old)
        count = 0
        while True:
            with self._database.adding() as connection:
                deleted = connection.execute(query).rowcount
            count += deleted
            if deleted < ROWS:
                return count


def _newest_key() -> Select[tuple[str]]:
    """The newest key. It stays, also if it is revoked: a database without any key opens a server to everybody."""
    return select(api_keys.c.id).order_by(api_keys.c.created.desc(), api_keys.c.id).limit(1)
