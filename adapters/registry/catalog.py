"""Catalog: the registry's names, versions and aliases in the database. A change in it is durable and acknowledged.

Each method is one transaction.
"""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

from sqlalchemy import ColumnElement, Connection, Row, and_, delete, insert, select, update

from adapters.errors import AdapterConflict, AdapterNameError, RevisionMismatch, UnknownAdapter
from adapters.format.selection import Selection
from adapters.format.spec import AdapterId
from adapters.registry import schema
from adapters.registry.audit import Action, record
from adapters.registry.contents import Admission, check_stored, put_admission, touch
from adapters.registry.database import Database
from adapters.registry.names import Reference, case_folded, is_possible_name
from adapters.registry.snapshot import Alias, Entry, Target, Version

UNCHECKED = "it has not been checked on this base yet"
"""Reason given for content that has no admission on this base."""
Fits = Callable[[Collection[int]], bool]
"""Returns whether adapters of these ranks may be pinned together."""


@dataclass(frozen=True, slots=True)
class Change:
    """Which name to change, and the revision it must have."""

    name: str
    expected: int | None = None
    """The revision that the caller has seen, 0 for a name that must be new; None to skip the check."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What has changed since a revision."""

    revision: int
    entries: Sequence[Entry] = ()
    aliases: Sequence[Alias] = ()
    gone: Sequence[str] = ()
    unchecked: frozenset[AdapterId] = field(default_factory=frozenset)
    """Contents of the entries that have no admission on the base."""


class Catalog:
    """Names, versions and aliases in a database."""

    def __init__(self, database: Database, fits: Fits, max_rank: int) -> None:
        self._database = database
        self._fits = fits
        self._max_rank = max_rank

    # Queries

    def load(self, since: int, base: str) -> Changes:
        """Return all changes after revision ``since``; ``base``: the fingerprint of the base whose admissions count."""
        with self._database.reading() as connection:
            revision = connection.execute(select(schema.registry.c.revision)).scalar_one()
            if revision == since:
                return Changes(revision)
            changed = schema.names.c.revision > since
            rows = connection.execute(select(schema.names).where(changed)).all()
            held = self._versions(connection, base, changed)
            meant = _targets(connection, changed)
        return Changes(
            revision,
            [_entry(row, held.get(row.name, [])) for row in rows if row.kind == "adapter"],
            [Alias(row.name, tuple(meant[row.name]), row.created, row.revision) for row in rows if row.kind == "alias"],
            [row.name for row in rows if row.kind == "gone"],
            frozenset(v.content for each in held.values() for v in each if v.refused == UNCHECKED),
        )

    def origin(self, name: str, number: int) -> dict[str, Any]:
        """Return a version's source and ignored files, for the receipt. Raises :class:`UnknownAdapter`."""
        with self._database.reading() as connection:
            row = _version(connection, name, number)
            return {"source": row.source, **(row.selection or {})}

    # Names

    def add_version(
        self,
        change: Change,
        content: AdapterId,
        admission: Admission,
        source: str,
        selection: Selection,
        *,
        activate: bool,
        pin: bool | None,
    ) -> tuple[int, bool]:
        """Add reserved content to a name; return its number, and False if the name already had this content."""
        with self._database.writing() as (connection, revision), self._check_pins(connection):
            row = _require_free(connection, change, "adapter")
            held = schema.versions
            number = connection.execute(
                select(held.c.number).where(held.c.name == change.name, held.c.content == content)
            ).scalar()
            new = number is None
            number = (row.last if row else 0) + 1 if number is None else number
            known = row is not None and row.kind == "adapter"
            before = (row.active, row.pinned) if row and known else (None, False)
            after = (number if activate else before[0], before[1] if pin is None else pin)
            _put_name(
                connection,
                change.name,
                row,
                kind="adapter",
                active=after[0],
                last=max(number, row.last if row else 0),
                pinned=after[1],
                created=row.created if row and known else _now(),
                revision=revision,
            )
            if new:
                check_stored(connection, content)
                connection.execute(
                    insert(held).values(
                        name=change.name,
                        number=number,
                        content=content,
                        created=_now(),
                        source=source,
                        selection=selection.receipt(),
                    )
                )
            put_admission(connection, content, admission, revision)
            if new or before != after:
                detail = {"version": number, "content": content, "source": source}
                detail |= {"active": after[0], "pinned": after[1]}
                record(self._database, connection, "adapter.registered", change.name, **detail)
        return number, new

    def activate(self, change: Change, number: int) -> None:
        """Make a version the active one."""
        with self._database.writing() as (connection, revision), self._check_pins(connection):
            before = _require_kind(connection, change, "adapter").active
            _version(connection, change.name, number)
            _set_name(connection, change.name, active=number, revision=revision)
            back = before is not None and number < before
            action: Action = "adapter.rolled_back" if back else "adapter.activated"
            record(self._database, connection, action, change.name, version=number, before=before)

    def pin(self, change: Change, pinned: bool) -> None:
        """Pin the active version to the device, or unpin it."""
        with self._database.writing() as (connection, revision), self._check_pins(connection):
            _require_kind(connection, change, "adapter")
            _set_name(connection, change.name, pinned=pinned, revision=revision)
            record(self._database, connection, "adapter.pinned" if pinned else "adapter.unpinned", change.name)

    def remove(self, change: Change, number: int | None = None) -> None:
        """Remove an adapter, or an inactive version. Raises :class:`AdapterConflict` while an alias targets it."""
        with self._database.writing() as (connection, revision):
            row = _require_kind(connection, change, "adapter")
            held = schema.versions
            if number is None:
                _check_no_alias(connection, change.name)
                self._delete_versions(connection, held.c.name == change.name)
                _set_name(connection, change.name, kind="gone", active=None, pinned=False, revision=revision)
                record(self._database, connection, "adapter.removed", change.name)
                return
            _version(connection, change.name, number)
            if row.active == number:
                raise AdapterConflict(
                    f"`{change.name}@{number}` is the active version of `{change.name}`; activate another, "
                    "or delete the adapter",
                    code="version_active",
                )
            _check_no_alias(connection, change.name, number)
            self._delete_versions(connection, (held.c.name == change.name) & (held.c.number == number))
            _set_name(connection, change.name, revision=revision)
            record(self._database, connection, "version.removed", change.name, version=number)

    def put_alias(self, change: Change, targets: Sequence[Target]) -> bool:
        """Create or replace an alias; return whether it is new."""
        with self._database.writing() as (connection, revision):
            row = _require_free(connection, change, "alias")
            for target in targets:
                _check_target(connection, target)
            known = row is not None and row.kind == "alias"
            _put_name(
                connection,
                change.name,
                row,
                kind="alias",
                active=None,
                last=row.last if row else 0,
                pinned=False,
                created=row.created if row and known else _now(),
                revision=revision,
            )
            meant = schema.targets
            connection.execute(delete(meant).where(meant.c.alias == change.name))
            connection.execute(
                insert(meant),
                [
                    {"alias": change.name, "position": i, "adapter": t.adapter, "number": t.version, "weight": t.weight}
                    for i, t in enumerate(targets)
                ],
            )
            shown = {target.reference: target.weight for target in targets}
            record(self._database, connection, "alias.set", change.name, targets=shown)
        return not known

    def remove_alias(self, change: Change) -> None:
        """Remove an alias."""
        with self._database.writing() as (connection, revision):
            _require_kind(connection, change, "alias")
            connection.execute(delete(schema.targets).where(schema.targets.c.alias == change.name))
            _set_name(connection, change.name, kind="gone", revision=revision)
            record(self._database, connection, "alias.removed", change.name)

    def _versions(self, connection: Connection, base: str, changed: Any) -> dict[str, list[Version]]:
        held, contents, admissions = schema.versions, schema.contents, schema.admissions
        columns = (held.c.name, held.c.number, held.c.content, held.c.created, held.c.source)
        query = (
            select(*columns, contents, admissions.c.base, admissions.c.refused)
            .join(schema.names, schema.names.c.name == held.c.name)
            .join(contents, contents.c.id == held.c.content)
            .outerjoin(admissions, and_(admissions.c.content == contents.c.id, admissions.c.base == base))
            .where(changed)
            .order_by(held.c.number)
        )
        found: dict[str, list[Version]] = {}
        for row in connection.execute(query):
            refused = UNCHECKED if row.base is None else row.refused
            if refused is None and row.rank > self._max_rank:
                refused = f"its rank {row.rank} is above this server's --max-rank {self._max_rank}"
            version = Version(
                row.name,
                row.number,
                AdapterId(row.content),
                row.rank,
                row.size_bytes,
                row.targets,
                row.created,
                refused,
                row.source,
            )
            found.setdefault(row.name, []).append(version)
        return found

    def _delete_versions(self, connection: Connection, versions: ColumnElement[bool]) -> None:
        # Other servers may be using content that loses its name here: its grace period begins now.
        used = schema.contents.c.id.in_(select(schema.versions.c.content).where(versions))
        touch(connection, used, self._database.now(connection))
        connection.execute(delete(schema.versions).where(versions))

    @contextmanager
    def _check_pins(self, connection: Connection) -> Iterator[None]:
        """Raise :class:`AdapterConflict` if the block pins more than before, and more than fits the device.

        If the pins do not fit from the start, as on a server with fewer slots, other changes must still be possible.
        """
        before = _pinned_ranks(connection)
        yield
        ranks = _pinned_ranks(connection)
        more = len(ranks) > len(before) or any(rank > had for rank, had in zip(ranks, before, strict=False))
        if more and not self._fits(ranks):
            raise AdapterConflict(
                f"{len(ranks)} pinned adapters, of ranks up to {max(ranks)}, do not fit the device: one slot must "
                "stay free for the others",
                code="too_many_pins",
            )


def _now() -> int:
    return int(time.time())


def _targets(connection: Connection, changed: Any) -> dict[str, list[Target]]:
    table = schema.targets
    query = select(table).join(schema.names, schema.names.c.name == table.c.alias).where(changed)
    found: dict[str, list[Target]] = {}
    for row in connection.execute(query.order_by(table.c.alias, table.c.position)):
        found.setdefault(row.alias, []).append(Target(row.adapter, row.number, row.weight))
    return found


def _entry(row: Row[Any], held: Iterable[Version]) -> Entry:
    versions = {version.number: version for version in held}
    return Entry(row.name, row.created, row.active, row.pinned, versions, row.revision)


def _pinned_ranks(connection: Connection) -> list[int]:
    """Return the ranks of the pinned contents, largest first."""
    names, held, contents = schema.names, schema.versions, schema.contents
    query = (
        select(contents.c.id, contents.c.rank)
        .join(held, held.c.content == contents.c.id)
        .join(names, and_(names.c.name == held.c.name, names.c.active == held.c.number))
        .where(names.c.pinned)
        .distinct()
    )
    return sorted((row.rank for row in connection.execute(query)), reverse=True)


def _row(connection: Connection, name: str) -> Row[Any] | None:
    if not is_possible_name(name):
        return None
    return connection.execute(select(schema.names).where(schema.names.c.name == name)).first()


def refuse_unknown(change: Change) -> NoReturn:
    """Raise what a change of a name raises that does not exist."""
    _check_revision(change, None)
    raise UnknownAdapter(change.name)


def _check_revision(change: Change, row: Row[Any] | None) -> None:
    """Raise :class:`RevisionMismatch` unless the name has the revision that the caller expects."""
    revision = 0 if row is None or row.kind == "gone" else row.revision
    if change.expected is not None and change.expected != revision:
        raise RevisionMismatch(f"`{change.name}` has changed since you looked; look again")


def _require_kind(connection: Connection, change: Change, kind: str) -> Row[Any]:
    row = _row(connection, change.name)
    _check_revision(change, row)
    if row is None or row.kind != kind:
        raise UnknownAdapter(change.name)
    return row


def _require_free(connection: Connection, change: Change, kind: str) -> Row[Any] | None:
    """Return the name's row, None if it is new. Raises if it is of another kind, or differs from one only in case."""
    row = _row(connection, change.name)
    if row is not None and row.kind not in (kind, "gone"):
        raise AdapterConflict(f"`{change.name}` is an {row.kind} already", code="name_taken")
    _check_revision(change, row)
    table = schema.names
    query = select(table.c.name).where(
        table.c.folded == case_folded(change.name), table.c.name != change.name, table.c.kind != "gone"
    )
    other = connection.execute(query).scalar()
    if other is not None:
        raise AdapterNameError(
            f"{change.name!r} differs from {other!r}, which exists, in upper and lower case only", other=other
        )
    return row


def _put_name(connection: Connection, name: str, row: Row[Any] | None, **values: Any) -> None:
    if row is None:
        connection.execute(insert(schema.names).values(name=name, folded=case_folded(name), **values))
    else:
        _set_name(connection, name, **values)


def _set_name(connection: Connection, name: str, **values: Any) -> None:
    connection.execute(update(schema.names).where(schema.names.c.name == name).values(**values))


def _version(connection: Connection, name: str, number: int) -> Row[Any]:
    table = schema.versions
    row = connection.execute(select(table).where(table.c.name == name, table.c.number == number)).first()
    if row is None:
        raise UnknownAdapter(str(Reference(name, number)))
    return row


def _check_target(connection: Connection, target: Target) -> None:
    row = _require_kind(connection, Change(target.adapter), "adapter")
    if target.version is not None:
        _version(connection, target.adapter, target.version)
    elif row.active is None:
        raise AdapterConflict(
            f"`{target.adapter}` has no active version that an alias could mean; activate one, or name a version",
            code="no_active_version",
        )


def _check_no_alias(connection: Connection, name: str, number: int | None = None) -> None:
    table = schema.targets
    query = select(table.c.alias).where(table.c.adapter == name)
    if number is not None:
        query = query.where(table.c.number == number)
    alias = connection.execute(query.order_by(table.c.alias)).scalar()
    if alias is not None:
        raise AdapterConflict(
            f"the alias `{alias}` means `{Reference(name, number)}`; change or delete it first",
            code="aliased",
            other=alias,
        )
