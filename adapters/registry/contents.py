"""Contents: the database rows of stored content, and the results of its checks.

Each method is one transaction.
"""

import time
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, case, delete, exists, func, insert, select, true, update

from adapters.errors import QuotaExceeded, RegistryUnavailable
from adapters.format.spec import AdapterId, AdapterSpec
from adapters.registry import schema
from adapters.registry.database import Database

DELETING_SECONDS = 10
"""Seconds that a registration waits while another server deletes the same content."""


@dataclass(frozen=True, slots=True)
class Admission:
    """The result of checking a content on a base."""

    base: str
    receipt: dict[str, Any]
    refused: str | None = None


class Contents:
    """Contents and admissions in a database. A row is inserted before its bytes are stored, and deleted after them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def referenced(self) -> set[AdapterId]:
        """Return all content that some version refers to."""
        with self._database.reading() as connection:
            return set(connection.execute(select(schema.versions.c.content).distinct()).scalars())

    def stored_bytes(self) -> int:
        """Return the bytes of all contents."""
        with self._database.reading() as connection:
            return _stored_bytes(connection)

    def admission(self, content: AdapterId, base: str) -> Admission | None:
        """Return the admission of a content on a base, None if it was never checked there."""
        table = schema.admissions
        with self._database.reading() as connection:
            row = connection.execute(select(table).where(table.c.content == content, table.c.base == base)).first()
        return None if row is None else Admission(row.base, row.receipt, row.refused)

    def reserve(self, spec: AdapterSpec, stored_bytes: int, quota: int | None, more_bytes: int = 0) -> None:
        """Insert a content's row; call it before its bytes are stored.

        ``more_bytes`` are those that are stored if the content is there already: the record of another name.
        Waits while another server deletes the same content. Raises :class:`QuotaExceeded`, and
        :class:`RegistryUnavailable` if that deletion does not end in time.
        """
        deadline = time.monotonic() + DELETING_SECONDS
        while not self._reserve(spec, stored_bytes, quota, more_bytes):
            if time.monotonic() > deadline:
                raise RegistryUnavailable("another server is still deleting the same content; try again later")
            time.sleep(0.05)

    def _reserve(self, spec: AdapterSpec, stored_bytes: int, quota: int | None, more_bytes: int) -> bool:
        table = schema.contents
        with self._database.writing() as (connection, _):
            row = connection.execute(select(table).where(table.c.id == spec.id)).first()
            if row is not None and row.deleting:
                return False
            now = self._database.now(connection)
            if row is not None and more_bytes:
                _check_quota(connection, more_bytes, quota)
                known = table.c.id == spec.id
                connection.execute(update(table).where(known).values(stored_bytes=table.c.stored_bytes + more_bytes))
            if row is not None:
                touch(connection, table.c.id == spec.id, now)
                return True
            _check_quota(connection, stored_bytes, quota)
            connection.execute(
                insert(table).values(
                    id=spec.id,
                    size_bytes=spec.size_bytes,
                    stored_bytes=stored_bytes,
                    rank=spec.rank,
                    targets=len(spec.targets),
                    touched=now,
                    deleting=False,
                )
            )
        return True

    def admit(self, content: AdapterId, admission: Admission) -> None:
        """Record the result of checking a stored content on another base."""
        with self._database.writing() as (connection, revision):
            check_stored(connection, content)
            put_admission(connection, content, admission, revision)

    def unreferenced(self, grace: float) -> list[tuple[AdapterId, int]]:
        """Return (content, time touched) of contents without versions that were not touched for ``grace`` seconds.

        Includes those marked as being deleted: the server that began that must have died.
        """
        table = schema.contents
        with self._database.reading() as connection:
            # Without grace, ignore clocks: one that was set back would keep content for ever.
            old = table.c.touched <= self._database.now(connection) - int(grace * 1e6) if grace else true()
            rows = connection.execute(select(table.c.id, table.c.touched).where(old, ~_referenced())).all()
        return [(AdapterId(row.id), row.touched) for row in rows]

    def begin_delete(self, content: AdapterId, touched: int) -> int | None:
        """Claim a content for deletion, and return the claim; until :meth:`end_delete` nobody can store it again.

        Returns None if it was touched since, for example by another server that is deleting it.
        """
        table = schema.contents
        mine = (table.c.id == content) & (table.c.touched == touched) & ~_referenced()
        with self._database.writing() as (connection, _):
            if connection.execute(select(table.c.id).where(mine)).first() is None:
                return None
            touch(connection, mine, self._database.now(connection))
            claim = update(table).where(table.c.id == content).values(deleting=True).returning(table.c.touched)
            return int(connection.execute(claim).scalar_one())

    def end_delete(self, content: AdapterId, claim: int) -> None:
        """Delete the row of a content whose bytes are gone. Does nothing if another server took over the deletion."""
        table = schema.contents
        mine = (table.c.id == content) & (table.c.touched == claim)
        with self._database.writing() as (connection, _):
            if connection.execute(select(table.c.id).where(mine)).first() is not None:
                connection.execute(delete(schema.admissions).where(schema.admissions.c.content == content))
                connection.execute(delete(table).where(mine))


def _check_quota(connection: Connection, more: int, quota: int | None) -> None:
    used = _stored_bytes(connection)
    if quota is not None and used + more > quota:
        raise QuotaExceeded(
            f"no room to store the adapter: it takes {more} bytes, and {used} of the quota of {quota} are in use"
        )


def _stored_bytes(connection: Connection) -> int:
    return int(connection.execute(select(func.coalesce(func.sum(schema.contents.c.stored_bytes), 0))).scalar_one())


def _names(content: AdapterId) -> Select[tuple[str]]:
    return select(schema.versions.c.name).where(schema.versions.c.content == content)


def _referenced() -> Any:
    return exists().where(schema.versions.c.content == schema.contents.c.id)


def touch(connection: Connection, which: ColumnElement[bool], now: int) -> None:
    """Record that these contents are in use at ``now`` (Unix time, microseconds); ``touched`` always increases."""
    touched = schema.contents.c.touched
    later = case((touched < now, now), else_=touched + 1)
    connection.execute(update(schema.contents).where(which).values(touched=later))


def check_stored(connection: Connection, content: AdapterId) -> None:
    """Raise :class:`RegistryUnavailable` if the content is deleted, or being deleted."""
    table = schema.contents
    deleting = connection.execute(select(table.c.deleting).where(table.c.id == content)).scalar()
    if deleting is not False:
        raise RegistryUnavailable("the content was deleted while it was being registered; try again")


def put_admission(connection: Connection, content: AdapterId, admission: Admission, revision: int) -> None:
    """Replace the content's admission on that base. If the outcome changed, bump the revision of all its names."""
    table = schema.admissions
    known = (table.c.content == content) & (table.c.base == admission.base)
    before = connection.execute(select(table.c.refused).where(known)).first()
    if before is None or before.refused != admission.refused:
        named = schema.names.c.name.in_(_names(content))
        connection.execute(update(schema.names).where(named).values(revision=revision))
    connection.execute(delete(table).where(known))
    connection.execute(
        insert(table).values(content=content, base=admission.base, refused=admission.refused, receipt=admission.receipt)
    )
