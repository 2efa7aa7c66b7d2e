"""Database: one SQLite file, or a PostgreSQL database that several servers share."""

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
"""Maximum seconds that a change waits for the lock of another."""
IDLE_SECONDS = 5
"""Maximum seconds that a transaction may be idle: a server that died during a change must not block the others."""
_SQLITE_FULL = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE}
_POSTGRES_FULL = "53100"
_STATEMENT_ERRORS = (DataError, IntegrityError, NotSupportedError, ProgrammingError)
"""Errors caused by the SQL statement itself, so bugs of ours. All others mean that the database is unavailable."""


class Database:
    """An open database whose schema is up to date. Any thread may call any method.

    Methods raise :class:`RegistryUnavailable` if the database cannot be reached or used, and :class:`StoreFull` if its
    disk is full; then nothing has changed, unless the connection was lost while the database acknowledged a change.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.shared = engine.dialect.name == "postgresql"
        """Whether other servers may change the database."""
        with self._translate_errors(), engine.begin() as connection:
            migrate(connection)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Yield a connection whose queries all read the same snapshot."""
        with self._translate_errors(), self._engine.connect() as connection:
            if self.shared:
                connection.execution_options(isolation_level="REPEATABLE READ")
            with connection.begin():
                yield connection

    @contextmanager
    def writing(self) -> Iterator[tuple[Connection, int]]:
        """Yield a connection for one change, and the change's revision. Commits at the end; changes are serialised."""
        next_revision = update(registry).values(revision=registry.c.revision + 1).returning(registry.c.revision)
        with self._translate_errors(), self._engine.begin() as connection:
            yield connection, connection.execute(next_revision).scalar_one()

    @contextmanager
    def adding(self) -> Iterator[Connection]:
        """Yield a connection for rows that no snapshot of the registry has, such as usage. Commits at the end.

        It takes no revision, and waits for no other change. Begin with a write: SQLite cannot turn a transaction that
        has read into one that writes while somebody else does.
        """
        with self._translate_errors(), self._engine.begin() as connection:
            yield connection

    def now(self, connection: Connection) -> int:
        """Return the Unix time in microseconds, by the database's clock if servers share it."""
        if not self.shared:
            return time.time_ns() // 1000
        clock = func.extract("epoch", func.clock_timestamp()) * 1_000_000
        return int(connection.execute(select(cast(clock, BigInteger))).scalar_one())

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            if _is_disk_full(error.orig):
                raise StoreFull("the disk of the registry's database is full; free some space on it") from error
            if _is_damaged(error.orig):
                raise RegistryUnavailable(
                    "the registry's database is damaged; restore it from a backup, and restart the server"
                ) from error
            if error.connection_invalidated or not isinstance(error, _STATEMENT_ERRORS):
                raise RegistryUnavailable("the registry's database cannot be reached; try again later") from error
            raise
        except PoolTimeout as error:
            raise RegistryUnavailable("the registry's database is busy; try again later") from error


def open_sqlite(file: Path) -> Database:
    """Open or create a SQLite file. Only one server may use it; commands on the same machine may do so meanwhile."""
    engine = create_engine(URL.create("sqlite", database=str(file)), connect_args={"timeout": LOCK_SECONDS})

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _: object) -> None:
        connection.isolation_level = None  # otherwise the driver begins no transaction for a SELECT
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    return Database(engine)


def open_postgres(url: str) -> Database:
    """Connect to a PostgreSQL database that several servers share. Timeouts are a few seconds."""
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
    """Escape what a database cannot store: NUL, and lone surrogates (from file names that are not UTF-8)."""
    return text.encode(errors="backslashreplace").decode().replace("\0", "\\0")


def _is_damaged(cause: BaseException | None) -> bool:
    code = getattr(cause, "sqlite_errorcode", 0) & 0xFF  # the primary code of an extended one
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _is_disk_full(cause: BaseException | None) -> bool:
    if isinstance(cause, sqlite3.Error):
        return getattr(cause, "sqlite_errorcode", None) in _SQLITE_FULL
    if isinstance(cause, OSError):
        return cause.errno == errno.ENOSPC
    return getattr(cause, "sqlstate", None) == _POSTGRES_FULL
