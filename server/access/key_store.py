"""KeyStore: keys in the registry's database, which servers may share, and a snapshot of them in memory."""

import secrets
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, func, insert, select, update

from adapters.registry import schema
from adapters.registry.audit import record
from adapters.registry.database import Database
from adapters.registry.schema import api_keys
from server.access.credentials import SHOWN, Credential, CredentialIndex, digest_of, new_secret
from server.access.key import ApiKey, KeyLimits
from server.access.key_spec import KeySpec
from server.errors import KeyConflict, UnknownKey


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key as the database keeps it: without its secret."""

    key: ApiKey
    prefix: str
    """The first characters of its secret, by which people recognise it."""
    created: int
    """Unix time in seconds, like the others."""
    revoked: int | None
    digest: str = field(repr=False)
    old_digest: str | None = field(repr=False)
    """Of the secret before the last rotation, if that is still accepted for a while."""
    old_until: int | None
    """When that ends."""

    @property
    def order(self) -> tuple[int, str]:
        """By which lists are sorted: the oldest first."""
        return self.created, self.key.id

    def to_json(self) -> dict[str, Any]:
        """Return it as ``GET /v1/keys/ID`` shows it: without its secret and without its digest."""
        key = self.key
        return {
            "id": key.id,
            "object": "key",
            "name": key.name,
            "prefix": self.prefix,
            "scopes": sorted(key.scopes),
            "adapters": None if key.adapters is None else list(key.adapters),
            "limits": asdict(key.limits),
            "weight": key.weight,
            "created": self.created,
            "expires": None if key.expires is None else int(key.expires.timestamp()),
            "revoked": self.revoked,
            "old_secret_until": self.old_until,
        }

    @property
    def credentials(self) -> Iterator[Credential]:
        """What shows that a caller has the key: nothing if it is revoked."""
        if self.revoked is not None:
            return
        expires = None if self.key.expires is None else self.key.expires.timestamp()
        yield Credential(self.digest, self.key, expires)
        if self.old_digest is not None and self.old_until is not None:
            yield Credential(self.old_digest, self.key, min(self.old_until, expires or self.old_until))


class KeyStore:
    """Keys in a database. Any thread may call any method.

    Those that change something are durable once they return, and raise RegistryUnavailable or StoreFull if they cannot.
    Keys that are not revoked are in a snapshot in memory, so that no request waits for a database to find its own. The
    revoked ones are only in the database: over the years there may be any number of them.
    """

    def __init__(self, database: Database) -> None:
        """Read all keys. Raises RegistryUnavailable."""
        self._database = database
        self._refreshing = threading.Lock()
        self._revision = -1
        self._stored: dict[str, StoredKey] = {}
        """Those that are not revoked, by id. Replaced, never changed."""
        self.index = CredentialIndex()
        self.any = False
        """Whether there is a key or ever was one. If the last one is revoked, or an old copy of the database restored,
        the server must not be open to everybody."""
        self.refresh()

    # Queries

    def __len__(self) -> int:
        """Return the number of keys in memory."""
        return len(self._stored)

    def stored(self, *, revoked: bool = False) -> list[StoredKey]:
        """Return the keys, oldest first: those that are not revoked; with ``revoked`` all, by a query."""
        found = self._read(None) if revoked else list(self._stored.values())
        return sorted(found, key=lambda each: each.order)

    def get(self, id_: str) -> StoredKey:
        """Return a key, which may be revoked. Queries the database unless it is in memory. Raises UnknownKey."""
        found = self._stored.get(id_)
        if found is None:
            found = next(iter(self._read(api_keys.c.id == id_)), None)
        if found is None:
            raise UnknownKey(id_)
        return found

    def names(self, ids: Collection[str]) -> Mapping[str, str]:
        """Return the names of those of ``ids`` that are keys, also of revoked ones. Queries the database for these."""
        stored = self._stored
        found = {id_: stored[id_].key.name for id_ in ids if id_ in stored}
        if missing := set(ids) - found.keys():
            found |= {each.key.id: each.key.name for each in self._read(api_keys.c.id.in_(missing))}
        return found

    def named(self, word: str) -> StoredKey:
        """Return the key with this id, or the one with this name that is not revoked. Raises UnknownKey."""
        if (found := self._stored.get(word)) is not None:  # a key may have the id of another one as its name
            return found
        named = (each for each in self._stored.values() if each.key.name == word)
        return next(named, None) or self.get(word)

    def _read(self, condition: ColumnElement[bool] | None) -> list[StoredKey]:
        """Read the keys that satisfy ``condition`` from the database; None: all. Raises RegistryUnavailable."""
        query = select(api_keys) if condition is None else select(api_keys).where(condition)
        with self._database.reading() as connection:
            return [_stored_key(row) for row in connection.execute(query)]

    # Changes

    def add(self, spec: KeySpec) -> tuple[StoredKey, str]:
        """Make a key; return it and its secret, which is not kept. Raises KeyConflict if the name is taken."""
        id_, secret = f"key_{secrets.token_hex(8)}", new_secret()
        key, table = spec.key(id_), api_keys
        with self._database.writing() as (connection, revision):
            taken = select(table.c.id).where(table.c.name == spec.name, table.c.revoked.is_(None))
            if connection.execute(taken).first() is not None:
                raise KeyConflict(f"A key named `{spec.name}` exists; revoke or rotate it.", code="key_exists")
            connection.execute(
                insert(table).values(
                    id=id_,
                    name=key.name,
                    scopes=sorted(key.scopes),
                    adapters=None if key.adapters is None else list(key.adapters),
                    limits=asdict(key.limits),
                    weight=key.weight,
                    expires=None if key.expires is None else int(key.expires.timestamp()),
                    created=_now(),
                    revision=revision,
                    **_secret_columns(secret),
                )
            )
            allowed = spec.model_dump(mode="json", exclude={"name"}, exclude_none=True)
            record(self._database, connection, "key.added", key.name, id=id_, **allowed)
        self.refresh()
        return self.get(id_), secret

    def revoke(self, id_: str) -> StoredKey:
        """End a key for ever. Raises UnknownKey if there is none that is not revoked."""
        with self._database.writing() as (connection, revision):
            name = _require(connection, id_).name
            _set(connection, id_, revoked=_now(), old_digest=None, old_until=None, revision=revision)
            record(self._database, connection, "key.revoked", name, id=id_)
        self.refresh()
        return self.get(id_)

    def rotate(self, id_: str, overlap: int = 0) -> tuple[StoredKey, str]:
        """Give a key another secret, and return both. The old secret is accepted for ``overlap`` more seconds.

        Raises UnknownKey if there is no such key, or it is revoked.
        """
        secret = new_secret()
        with self._database.writing() as (connection, revision):
            row = _require(connection, id_)
            old = {"old_digest": row.digest, "old_until": _now() + overlap} if overlap else {}
            kept = {"old_digest": None, "old_until": None, **old}
            _set(connection, id_, **_secret_columns(secret), **kept, revision=revision)
            record(self._database, connection, "key.rotated", row.name, id=id_, overlap_seconds=overlap)
        self.refresh()
        return self.get(id_), secret

    # Following the database

    def refresh(self) -> None:
        """Load what all servers have changed into the snapshot. Raises RegistryUnavailable."""
        with self._refreshing:
            with self._database.reading() as connection:
                revision = connection.execute(select(schema.registry.c.revision)).scalar_one()
                if revision == self._revision:
                    return
                stored = self._follow(connection, revision)
                some = select(api_keys.c.id).limit(1)
                self.any = self.any or bool(stored) or connection.execute(some).first() is not None
            self._revision = revision
            if stored != self._stored:
                self._stored = stored
                self.index = CredentialIndex(each for key in stored.values() for each in key.credentials)

    def _follow(self, connection: Connection, revision: int) -> dict[str, StoredKey]:
        """Return the keys that are not revoked: what this has, with what changed up to ``revision``, or all anew."""
        table, valid = api_keys, api_keys.c.revoked.is_(None)
        if revision > self._revision >= 0:
            changed = connection.execute(select(table).where(table.c.revision > self._revision))
            stored = self._stored | {row.id: _stored_key(row) for row in changed}
            stored = {id_: each for id_, each in stored.items() if each.revoked is None}
            # The row of a revoked key may have been deleted (--history-days) before this server could read it. Then
            # there is a key too many here.
            if len(stored) == connection.execute(select(func.count()).select_from(table).where(valid)).scalar_one():
                return stored
        # Also if the revision is lower than the last, because a backup was restored.
        return {row.id: _stored_key(row) for row in connection.execute(select(table).where(valid))}


def _now() -> int:
    return int(time.time())


def _secret_columns(secret: str) -> dict[str, str]:
    return {"digest": digest_of(secret), "prefix": secret[:SHOWN]}


def _require(connection: Connection, id_: str) -> Row[Any]:
    table = api_keys
    row = connection.execute(select(table).where(table.c.id == id_, table.c.revoked.is_(None))).first()
    if row is None:
        raise UnknownKey(id_)
    return row


def _set(connection: Connection, id_: str, **values: Any) -> None:
    connection.execute(update(api_keys).where(api_keys.c.id == id_).values(**values))


def _stored_key(row: Row[Any]) -> StoredKey:
    key = ApiKey(
        row.id,
        row.name,
        frozenset(row.scopes),
        None if row.adapters is None else tuple(row.adapters),
        KeyLimits(**row.limits),
        row.weight,
        None if row.expires is None else datetime.fromtimestamp(row.expires, UTC),
    )
    return StoredKey(key, row.prefix, row.created, row.revoked, row.digest, row.old_digest, row.old_until)
