"""The audit log: every change of the registry and of keys, with who made it, what, when and from where.

An entry is written in the transaction of its change: neither is there without the other.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, Row, insert, select

from adapters.registry.database import Database, storable
from adapters.registry.schema import audit

Action = Literal[
    "adapter.registered",
    "adapter.activated",
    "adapter.rolled_back",
    "adapter.pinned",
    "adapter.unpinned",
    "adapter.removed",
    "version.removed",
    "alias.set",
    "alias.removed",
    "key.added",
    "key.revoked",
    "key.rotated",
    "request.forbidden",
]
"""What was done. ``request.forbidden``: nothing; a key has tried what it may not do."""


@dataclass(frozen=True, slots=True)
class Actor:
    """Who makes changes, and from where."""

    key: str
    """Id of the API key. Empty if there is none: for a server without keys, and for the server itself."""
    name: str
    """Name of the key, ``anonymous``, ``server`` for what it does by itself, or ``command line``."""
    address: str | None = None
    """Address of the client."""
    request_id: str | None = None


SERVER = Actor("", "server")
"""The server itself: adapters that its options name, and the watched folder."""
COMMAND_LINE = Actor("", "command line")
"""A command that works on the database itself."""
_ACTOR: ContextVar[Actor] = ContextVar("_ACTOR", default=SERVER)


@contextmanager
def acting(actor: Actor) -> Iterator[None]:
    """Within this context, and on threads that are given work from it, changes are made by ``actor``."""
    token = _ACTOR.set(actor)
    try:
        yield
    finally:
        _ACTOR.reset(token)


def record(database: Database, connection: Connection, action: Action, name: str, **detail: Any) -> None:
    """Add an entry for a change to the transaction of ``connection``. ``name``: what was changed, without a version."""
    write(connection, database.now(connection), _ACTOR.get(), action, name, detail)


def write(connection: Connection, at: int, actor: Actor, action: Action, name: str, detail: Mapping[str, Any]) -> None:
    """Add an entry. ``at``: Unix time in microseconds."""
    connection.execute(
        insert(audit).values(
            at=at,
            key=actor.key,
            key_name=storable(actor.name),
            address=actor.address,
            request_id=actor.request_id,
            action=action,
            name=storable(name),
            detail=dict(detail),
        )
    )


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """Which entries to read; None: all. Times are Unix time in microseconds."""

    since: int | None = None
    """At this time or later."""
    until: int | None = None
    """Before this time."""
    key: str | None = None
    """Id or name of the key."""
    name: str | None = None
    action: str | None = None


def read(database: Database, wanted: AuditFilter, before: int | None, count: int) -> Sequence[Row[Any]]:
    """Return up to ``count`` entries, the latest first. ``before``: an id, to read only earlier entries."""
    query = select(audit).order_by(audit.c.id.desc()).limit(count)
    if before is not None:
        query = query.where(audit.c.id < before)
    if wanted.since is not None:
        query = query.where(audit.c.at >= wanted.since)
    if wanted.until is not None:
        query = query.where(audit.c.at < wanted.until)
    if wanted.key is not None:
        key = storable(wanted.key)
        query = query.where((audit.c.key == key) | (audit.c.key_name == key))
    if wanted.name is not None:
        query = query.where(audit.c.name == storable(wanted.name))
    if wanted.action is not None:
        query = query.where(audit.c.action == wanted.action)
    with database.reading() as connection:
        return connection.execute(query).all()
