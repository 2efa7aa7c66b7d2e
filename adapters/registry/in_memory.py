"""InMemoryRegistry: the part of the registry that requests use, in memory: names, and leases on adapters."""

import threading
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from adapters.errors import AdapterUnavailable, UnknownAdapter
from adapters.format.spec import AdapterId
from adapters.registry.canary import choose_target
from adapters.registry.names import parse_reference
from adapters.registry.snapshot import Alias, Entry, Snapshot, Version

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Lease:
    """A version that a request is using."""

    version: Version
    alias: str | None = None
    """The alias that the request named, if it did."""


class InMemoryRegistry:
    """Names, and leases on content. Any thread may call any method; all are quick, and none queries a database."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._snapshot = Snapshot()
        self._leases: Counter[AdapterId] = Counter()
        self._held: Counter[AdapterId] = Counter()
        """Content -> number of registrations in progress."""
        self._idle: set[AdapterId] = set()
        """Content that may have lost its last reference."""
        self._wake = threading.Event()
        """Set when there is something in ``_idle``."""

    def entry(self, name: str) -> Entry:
        """Return the adapter. Raises :class:`UnknownAdapter`."""
        with self._lock:
            return _lookup(self._snapshot.entries, name)

    def alias(self, name: str) -> Alias:
        """Return the alias. Raises :class:`UnknownAdapter`."""
        with self._lock:
            return _lookup(self._snapshot.aliases, name)

    def version(self, reference: str) -> Version:
        """Return the version that ``legal`` or ``legal@2`` means. Raises :class:`UnknownAdapter`."""
        with self._lock:
            return self._snapshot.version(parse_reference(reference))

    def knows(self, reference: str) -> bool:
        """Return whether a request may name it."""
        with self._lock:
            if reference in self._snapshot.aliases:
                return True
            try:
                self._snapshot.version(parse_reference(reference))
            except UnknownAdapter:
                return False
            return True

    def entries(self, after: str = "", limit: int | None = None) -> list[Entry]:
        """Return the adapters after ``after``, in the order of their names."""
        with self._lock:
            return self._snapshot.entries_after(after, limit)

    def aliases(self, after: str = "", limit: int | None = None) -> list[Alias]:
        """Return the aliases after ``after``, in the order of their names."""
        with self._lock:
            return self._snapshot.aliases_after(after, limit)

    def names(
        self, after: str = "", limit: int | None = None, *, versions: bool = True
    ) -> list[tuple[str, Version | Alias]]:
        """Return what a request may name, in order: adapters, with ``versions`` each of their versions, and aliases."""
        with self._lock:
            return list(islice(self._snapshot.servable(after, versions), limit))

    def names_of(self, contents: Collection[AdapterId]) -> list[str]:
        """Return the names of these contents."""
        with self._lock:
            return self._snapshot.names_of(contents)

    def aliased_to(self, name: str) -> list[str]:
        """Return the aliases that have this adapter as a target."""
        with self._lock:
            return self._snapshot.aliased_to(name)

    def acquire(self, references: Sequence[str], user: str | None = None) -> tuple[Lease, ...]:
        """Resolve all names atomically and return a lease for each, or raise and lease none.

        An alias resolves to one of its targets by weight, always the same one for one ``user``. Raises
        :class:`UnknownAdapter`, or :class:`AdapterUnavailable`.
        """
        with self._lock:
            leases = tuple(self._resolve(reference, user) for reference in references)
            self._leases.update(lease.version.content for lease in leases)
        return leases

    def release(self, leases: Iterable[Lease]) -> None:
        """Release the leases of :meth:`acquire`, once. Raises :class:`ValueError` for a lease that is not held."""
        contents = Counter(lease.version.content for lease in leases)
        with self._lock:
            if not contents <= self._leases:
                raise ValueError("released more leases than were acquired")
            self._leases -= contents
            self._note_idle(contents)

    def _resolve(self, text: str, user: str | None) -> Lease:
        alias = self._snapshot.aliases.get(text)
        reference = choose_target(alias, user).reference if alias else text
        version = self._snapshot.version(parse_reference(reference))
        if version.refused is not None:
            raise AdapterUnavailable(text, version.refused)
        return Lease(version, alias.name if alias else None)

    @contextmanager
    def _holding(self, content: AdapterId) -> Iterator[None]:
        """Keep a content's bytes while no version refers to it yet."""
        with self._lock:
            self._held[content] += 1
        try:
            yield
        finally:
            with self._lock:
                self._held -= Counter([content])
                self._note_idle([content])

    def _note_idle(self, contents: Iterable[AdapterId]) -> None:
        """Mark those of ``contents`` that nothing refers to any more as idle. The caller holds the lock."""
        idle = {content for content in contents if not self._refers_to(content)}
        if idle:
            self._idle |= idle
            self._wake.set()

    def _refers_to(self, content: AdapterId) -> bool:
        return bool(self._snapshot.refers_to(content) or self._leases[content] or self._held[content])


def _lookup(known: Mapping[str, T], name: str) -> T:
    try:
        return known[name]
    except KeyError:
        raise UnknownAdapter(name) from None
