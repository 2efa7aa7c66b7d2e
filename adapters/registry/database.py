"""Database: one SQLite file, or a PostgreSQL that several servers share. Transactions, and errors in our own terms."""

import errno
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, BigInteger, Connection, Engine, cast, create_engine, event, func, select, update
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, NotSupportedError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from adapters.errors import RegistryUnavailable, StoreFull
from adapters.registry.schema import migrate, registry

LOCK_SECONDS = 10
"""How long a change waits for those before it."""
IDLE_SECONDS = 5
"""How long a change may pause: a server that has gone in the middle of one must not hold up the others."""
_SQLITE_FULL = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE}
_POSTGRES_FULL = "53100"
_STATEMENT = (DataError, IntegrityError, NotSupportedError, ProgrammingError)
"""What only a statement of ours is at fault for. Anything else is the database's doing."""


class Database:
    """Opened and migrated. Any thread may use it.

    Its methods raise :class:`RegistryUnavailable` where the database cannot be reached or used, :class:`StoreFull`
    where its disk is full, and then nothing has changed; except that a connection may be lost just while a change is
    being acknowledged.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.shared = engine.dialect.name == "postgresql"
        """Whether other servers may change what is in it."""
        with self._translated(), engine.begin() as connection:
            migrate(connection)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """One moment's view of everything."""
        with self._translated(), self._engine.connect() as connection:
            if self.shared:
                connection.execution_options(isolation_level="REPEATABLE READ")
            with connection.begin():
                yield connection

    @contextmanager
    def writing(self) -> Iterator[tuple[Connection, int]]:
        """A change and its revision; whole at the end, or not at all. Changes come one after the other."""
        raised = update(registry).values(revision=registry.c.revision + 1).returning(registry.c.revision)
        with self._translated(), self._engine.begin() as connection:
            yield connection, connection.execute(raised).scalar_one()

    def now(self, connection: Connection) -> int:
        """Microseconds of Unix time, by the one clock that all servers of this database share."""
        if not self.shared:
            return time.time_ns() // 1000
        clock = func.extract("epoch", func.clock_timestamp()) * 1_000_000
        return int(connection.execute(select(cast(clock, BigInteger))).scalar_one())

    def close(self) -> None:
        """Give all connections back."""
        self._engine.dispose()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            if _full(error.orig):
                raise StoreFull("the disk of the registry's database is full") from error
            if _damaged(error.orig):
                raise RegistryUnavailable("the registry's database is damaged") from error
            if error.connection_invalidated or not isinstance(error, _STATEMENT):
                raise RegistryUnavailable("the registry's database cannot be reached; try again later") from error
            raise
        except PoolTimeout as error:
            raise RegistryUnavailable("the registry's database is busy; try again later") from error


def open_sqlite(file: Path) -> Database:
    """A file of our own, which one process owns."""
    engine = create_engine(URL.create("sqlite", database=str(file)), connect_args={"timeout": LOCK_SECONDS})

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _: object) -> None:
        connection.isolation_level = None  # the driver would begin no transaction for a SELECT
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    return Database(engine)


def open_postgres(url: str) -> Database:
    """A database of many servers. A server that does not answer is given up within seconds."""
    engine = create_engine(
        make_url(url).set(drivername="postgresql+psycopg"),
        pool_pre_ping=True,
        pool_timeout=LOCK_SECONDS,
        connect_args={
            "connect_timeout": 3,
            "tcp_user_timeout": 5000,
            "options": f"-c lock_timeout={LOCK_SECONDS}s -c statement_timeout={3 * LOCK_SECONDS}s "
            f"-c idle_in_transaction_session_timeout={IDLE_SECONDS}s",
        },
    )
    return Database(engine)


def storable(text: str) -> str:
    """The text without what a database cannot hold: half surrogate pairs, of names that are no text, and NUL."""
    return text.encode(errors="backslashreplace").decode().replace("\0", "\\0")


def _damaged(cause: BaseException | None) -> bool:
    code = getattr(cause, "sqlite_errorcode", 0) & 0xFF  # without what extends it
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _full(cause: BaseException | None) -> bool:
    if isinstance(cause, sqlite3.Error):
        return getattr(cause, "sqlite_errorcode", None) in _SQLITE_FULL
    if isinstance(cause, OSError):
        return cause.errno == errno.ENOSPC
    return getattr(cause, "sqlstate", None) == _POSTGRES_FULL
