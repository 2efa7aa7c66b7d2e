"""The registry: register, activate, pin, alias and remove adapters, and follow the changes of other servers.

The catalog (names, versions, aliases, pins) and the store (bytes) are durable. A snapshot of the catalog is kept in
memory, so that resolving a request's names needs no database query, with the leases of this server. Bytes stay in the
store as long as a version, a lease or a registration in progress refers to them.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapters.errors import AdapterError, RegistryUnavailable, UnknownAdapter
from adapters.format.selection import NO_OTHER_FILES, Selection
from adapters.format.spec import AdapterId
from adapters.registry.admission import AdmissionControl
from adapters.registry.catalog import Catalog, Change, Changes
from adapters.registry.contents import Contents
from adapters.registry.database import Database, storable
from adapters.registry.hooks import RegistryHooks
from adapters.registry.in_memory import InMemoryRegistry
from adapters.registry.names import check_name, parse_reference
from adapters.registry.registration import DEFAULT_OPTIONS, Registered, RegistrationOptions
from adapters.registry.snapshot import Alias, Entry, Target, Version
from adapters.store.store import AdapterStore, folder_bytes

_log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
"""Seconds between two queries of a shared database for the changes of other servers."""
LOOK_SECONDS = 10.0
"""Seconds between two looks whether a database of this server alone can still be read: nobody else would notice."""
GRACE_SECONDS = 600
"""Seconds that unreferenced bytes stay in a shared store: another server may be using or registering them."""
CHECK_SECONDS = 60
"""Seconds until a check that failed without a result is tried again."""

MISSING = "its bytes are missing from the store; register it again"
"""Reason given for a version whose bytes were missing when the server started."""


@dataclass(frozen=True, slots=True)
class StoreUsage:
    """How much is registered, and the quota."""

    bytes: int
    """Bytes of all stored content."""
    quota_bytes: int | None
    """None: no quota."""
    adapters: int
    versions: int


class Registry(InMemoryRegistry):
    """Names, versions, aliases, pins and leases over a store. Any thread may call any method.

    Methods that change something are slow, and durable once they return; if they raise an AdapterError, nothing has
    changed. ``acquire``, ``release`` and all lookups in memory are quick and also work while the database is down.
    """

    def __init__(self, database: Database, store: AdapterStore, hooks: RegistryHooks, quota: int | None = None) -> None:
        super().__init__()
        self._catalog = Catalog(database, hooks.can_pin, hooks.max_rank)
        self._contents = Contents(database)
        self._store = store
        self._admissions = AdmissionControl(self._contents, store, hooks)
        self._hooks = hooks
        self._quota = quota
        self._shared = database.shared
        self._missing: frozenset[AdapterId] = frozenset()
        self._unchecked: dict[AdapterId, float] = {}
        """Content that has not been checked on this base -> time (monotonic) of its next check."""
        self._revision = 0
        self._stored_bytes = 0
        self._pins: list[Version] = []
        self._refreshing = threading.Lock()
        self._tidying = threading.Lock()
        self._last_sweep = 0.0
        self._unfinished = False
        """Whether some bytes still have to be deleted."""
        self._stopping = False
        self._thread: threading.Thread | None = None
        self.available = True
        """False while the database cannot be reached."""

    # Life

    def open(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Load what is registered and delete what a crash left behind. Must be called first.

        Content that was never checked on this base is checked now; ``progress`` receives (done, total).
        """
        referenced = self._contents.referenced()
        self._store.sweep(referenced)
        if self._store.remote is None:
            self._missing = frozenset(referenced - self._store.ids())
        self.refresh()
        for content in self._missing:
            _log.error("the bytes of adapter %s are missing: %s", content, self.names_of([content]))
        self._delete_unreferenced()
        unchecked = sorted(self._unchecked)
        for done, content in enumerate(unchecked):
            progress(done, len(unchecked))
            self._try_check(content)

    def start(self) -> None:
        """Start the thread that follows changes of other servers and deletes unused bytes."""
        self._thread = threading.Thread(target=self._run, name="registry", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    # Changes

    def register(
        self,
        name: str,
        staging: Path,
        source: str,
        options: RegistrationOptions = DEFAULT_OPTIONS,
        selection: Selection = NO_OTHER_FILES,
    ) -> Registered:
        """Verify the files in ``staging`` (a folder from the store's ``stage``), store them, and add them to ``name``.

        ``source`` and ``selection`` (which of the received files were taken) go into the receipt. Raises AdapterError.
        """
        check_name(name, self._hooks.reserved)
        spec = self._store.seal(staging, any_base=options.allow_base_mismatch, any_fields=options.allow_unknown_fields)
        with self._holding(spec.id):
            record_bytes = self._store.new_record_bytes(staging, spec.id, name)
            self._contents.reserve(spec, folder_bytes(staging), self._quota, record_bytes)
            self._store.publish(staging, spec.id, name, record_bytes)
            admission = self._admissions.admit(spec, options)
            number, new = self._catalog.add_version(
                Change(name, options.expected),
                spec.id,
                admission,
                source,
                selection,
                activate=options.activate,
                pin=options.pinned,
            )
            self._mark_found(spec.id)
            self.refresh()
        created = int(time.time())
        version = Version(
            name, number, spec.id, spec.rank, spec.size_bytes, len(spec.targets), created=created, source=source
        )
        try:
            entry = self.entry(name)
        except UnknownAdapter:  # removed again already, but it was registered
            entry = Entry(name, version.created, None, False, {}, 0)
        return Registered(entry.versions.get(number, version), entry, new)

    def register_folder(self, name: str, folder: Path, options: RegistrationOptions = DEFAULT_OPTIONS) -> Registered:
        """Copy a PEFT folder into the store and register the copy."""
        check_name(name, self._hooks.reserved)
        with self._store.stage() as staging:
            selection = self._store.copy(folder, staging)
            return self.register(name, staging, storable(f"folder {folder.name}"), options, selection)

    def activate(self, name: str, number: int, expected: int | None = None) -> Entry:
        """Make another version of ``name`` the active one."""
        self._catalog.activate(Change(name, expected), number)
        self.refresh()
        return self.entry(name)

    def pin(self, name: str, pinned: bool, expected: int | None = None) -> Entry:
        """Pin the active version to the device, or unpin it."""
        self._catalog.pin(Change(name, expected), pinned)
        self.refresh()
        return self.entry(name)

    def remove(self, reference: str, expected: int | None = None) -> None:
        """Remove an adapter, or one version (``legal@1``). Requests that hold a lease keep its content."""
        parsed = parse_reference(reference)
        self._catalog.remove(Change(parsed.name, expected), parsed.version)
        self.refresh()
        self._try_tidy()
        if self._unfinished:
            self._wake.set()

    def put_alias(self, name: str, targets: Sequence[Target], expected: int | None = None) -> tuple[Alias, bool]:
        """Create or replace an alias; return it, and whether it is new. Targets are adapters or versions."""
        check_name(name, self._hooks.reserved)
        new = self._catalog.put_alias(Change(name, expected), targets)
        self.refresh()
        return self.alias(name), new

    def remove_alias(self, name: str, expected: int | None = None) -> None:
        """Remove an alias."""
        self._catalog.remove_alias(Change(name, expected))
        self.refresh()

    # Queries

    def receipt(self, version: Version) -> dict[str, Any] | None:
        """Return the results of a version's checks and its origin, or None. Queries the database."""
        admission = self._contents.admission(version.content, self._hooks.base)
        origin = self._catalog.origin(version.adapter, version.number)
        return None if admission is None else {**admission.receipt, **origin}

    def usage(self) -> StoreUsage:
        """Return how much is registered."""
        with self._lock:
            return StoreUsage(self._stored_bytes, self._quota, len(self._snapshot.entries), self._snapshot.versions)

    # Maintenance

    def refresh(self) -> None:
        """Load the changes of all servers from the catalog into the snapshot."""
        with self._refreshing:
            changes = self._load()
            if changes.revision == self._revision:
                return
            stored_bytes = self._contents.stored_bytes()
            with self._lock:
                entries = [self._mark_missing(entry) for entry in changes.entries]
                self._note_idle(self._snapshot.apply(entries, changes.aliases, changes.gone))
                self._revision, self._stored_bytes = changes.revision, stored_bytes
                self._note_unchecked(changes)
            self._update_pins()

    def tidy(self) -> None:
        """Delete bytes that nothing refers to."""
        with self._tidying:
            idle = self._detach_idle()
            if idle and not self._shared:
                self._unfinished = True
            due = time.monotonic() - self._last_sweep > GRACE_SECONDS / 10 if self._shared else self._unfinished
            if due:
                self._delete_unreferenced()
                self._unfinished = False

    def _try_tidy(self) -> None:
        """Run :meth:`tidy`; on failure log it and try again later, since removing a name has succeeded regardless."""
        try:
            self.tidy()
        except (AdapterError, OSError) as error:
            _log.warning("could not delete unused adapter bytes; will try again later: %s", error)
            self._unfinished = True

    def _load(self) -> Changes:
        changes = self._catalog.load(self._revision, self._hooks.base)
        if changes.revision >= self._revision:
            return changes
        # A backup was restored, or a replica without the last changes has taken over.
        _log.warning(
            "the registry's database is older than revision %d, which this server has seen: loading all of it again",
            self._revision,
        )
        changes = self._catalog.load(-1, self._hooks.base)
        kept = {entry.name for entry in changes.entries} | {alias.name for alias in changes.aliases}
        lost = (self._snapshot.entries.keys() | self._snapshot.aliases.keys()) - kept
        return replace(changes, gone=sorted(lost))

    def _mark_found(self, content: AdapterId) -> None:
        """Handle bytes that were missing and are back: load the versions that refer to them again."""
        with self._refreshing:
            if content in self._missing:
                self._missing -= {content}
                self._revision = -1

    def _note_unchecked(self, changes: Changes) -> None:
        """Note which content was never checked on this base. The caller holds the lock."""
        checked = {v.content for entry in changes.entries for v in entry.versions.values()} - changes.unchecked
        due = dict.fromkeys(changes.unchecked - self._missing, 0.0) | self._unchecked
        self._unchecked = {c: t for c, t in due.items() if c not in checked and self._snapshot.refers_to(c)}

    def _mark_missing(self, entry: Entry) -> Entry:
        """Return the entry with versions refused whose bytes are missing from the store."""
        if not any(version.content in self._missing for version in entry.versions.values()):
            return entry
        versions = {
            number: replace(version, refused=MISSING) if version.content in self._missing else version
            for number, version in entry.versions.items()
        }
        return replace(entry, versions=versions)

    def _run(self) -> None:
        while not self._stopping:
            self._wake.wait(self._pause())
            self._wake.clear()
            try:
                self.available = self._follow()
                if self.available:
                    self._try_tidy()
                    self._check_due()
            except Exception:
                # The thread must survive any error: it has to see the next change.
                _log.exception("could not load changes of the registry; will try again")
                self._unfinished = True

    def _pause(self) -> float:
        """Return the seconds until the next round, unless somebody wakes the thread before."""
        return POLL_SECONDS if self._shared or not self.available else LOOK_SECONDS

    def _follow(self) -> bool:
        try:
            self.refresh()
        except RegistryUnavailable as error:
            if self.available:
                _log.warning("%s", error)
            return False
        return True

    def _detach_idle(self) -> list[AdapterId]:
        """Detach unreferenced content from the store, under the lock, so that nobody sees it half deleted.

        The server is notified first: a load that fails because the bytes are gone must not fail requests for the same
        content once it is registered again.
        """
        with self._lock:
            idle = [content for content in self._idle if not self._refers_to(content)]
            self._idle.clear()
            for content in idle:
                self._hooks.content_unused(content)
            trash = [self._store.detach(content) for content in idle]
        for path in trash:
            if path is not None:
                shutil.rmtree(path)
        return idle

    def _delete_unreferenced(self) -> None:
        """Delete content that no version on any server refers to and nobody here uses."""
        self._last_sweep = time.monotonic()
        grace = GRACE_SECONDS if self._shared else 0
        for content, touched in self._contents.unreferenced(grace):
            with self._lock:
                used = self._refers_to(content)
            claim = None if used else self._contents.begin_delete(content, touched)
            if claim is not None:
                self._store.erase(content)
                self._contents.end_delete(content, claim)
                self.refresh()  # updates the stored bytes

    def _check_due(self) -> None:
        for content, due in list(self._unchecked.items()):
            if not self._stopping and due <= time.monotonic():
                self._try_check(content)

    def _try_check(self, content: AdapterId) -> None:
        """Check content on this base. A failure is logged and tried again later; nothing else stops for it."""
        try:
            with self._holding(content):
                self._admissions.recheck(content)
                self.refresh()
        except Exception:
            _log.exception("could not check adapter %s on this base; will try again later", content)
            with self._lock:
                if content in self._unchecked:
                    self._unchecked[content] = time.monotonic() + CHECK_SECONDS

    def _update_pins(self) -> None:
        """Report which versions stay on the device: as many as fit, in the order of names."""
        with self._lock:
            entries = [self._snapshot.entries[name] for name in sorted(self._snapshot.pinned)]
        pins: dict[AdapterId, Version] = {}
        for entry in entries:
            version = entry.current
            if version is None or version.content in pins or version.refused is not None:
                continue
            ranks = [pinned.rank for pinned in pins.values()]
            if self._hooks.can_pin([*ranks, version.rank]):
                pins[version.content] = version
            else:
                _log.warning(
                    "%s is pinned, but does not fit this server's device: unpin others or raise --max-device-adapters",
                    version.name,
                )
        if list(pins.values()) != self._pins:
            self._pins = list(pins.values())
            self._hooks.pins_changed(self._pins)
