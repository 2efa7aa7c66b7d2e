"""Version, Entry and Alias, and Snapshot: all of them in memory, so that a request needs no database query."""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from adapters.errors import UnknownAdapter
from adapters.format.spec import AdapterId
from adapters.registry.names import Reference, parse_reference


@dataclass(frozen=True, slots=True)
class Version:
    """A content under a name and a number. Numbers are never reused."""

    adapter: str
    number: int
    content: AdapterId
    rank: int
    size_bytes: int
    targets: int
    """Number of layers it changes."""
    created: int
    """Unix time, seconds."""
    refused: str | None = None
    """Why this server cannot serve it; None if it can."""
    source: str = ""
    """Where it came from, as its receipt says it."""

    @property
    def name(self) -> str:
        """As in ``legal@2``."""
        return f"{self.adapter}@{self.number}"


@dataclass(frozen=True, slots=True)
class Entry:
    """An adapter: a name and its versions; the active one is used if a request names no version."""

    name: str
    created: int
    """Unix time, seconds."""
    active: int | None
    pinned: bool
    versions: Mapping[int, Version]
    """By number, ascending."""
    revision: int
    """Of the registry, when this entry last changed."""

    @property
    def current(self) -> Version | None:
        """The active version."""
        return None if self.active is None else self.versions[self.active]


@dataclass(frozen=True, slots=True)
class Target:
    """A target of an alias, with its weight."""

    adapter: str
    version: int | None
    """None: whichever is active."""
    weight: float

    @property
    def reference(self) -> str:
        """As in ``legal@1``, or ``legal``."""
        return str(Reference(self.adapter, self.version))


@dataclass(frozen=True, slots=True)
class Alias:
    """A name that resolves to one of several targets, by weight."""

    name: str
    targets: tuple[Target, ...]
    created: int
    """Unix time, seconds."""
    revision: int
    """Of the registry, when this alias last changed."""


class Snapshot:
    """All names and what they mean. Not thread-safe."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.aliases: dict[str, Alias] = {}
        self.versions = 0
        """Number of versions of all entries."""
        self.pinned: set[str] = set()
        """Names of the pinned entries."""
        self._order: list[str] = []
        """Names of entries and aliases, sorted."""
        self._users: dict[AdapterId, set[tuple[str, int]]] = {}
        """Content -> (name, number) of its versions."""
        self._aliased: dict[str, set[str]] = {}
        """Adapter -> aliases that have it as a target."""

    def apply(self, entries: Iterable[Entry], aliases: Iterable[Alias], gone: Iterable[str]) -> set[AdapterId]:
        """Apply changes; return the contents that no version refers to any more."""
        lost: set[AdapterId] = set()
        for name in gone:
            lost |= self._drop(name)
        for entry in entries:
            lost |= self._drop(entry.name)
            self._add(entry.name)
            self.entries[entry.name] = entry
            self.versions += len(entry.versions)
            if entry.pinned:
                self.pinned.add(entry.name)
            for version in entry.versions.values():
                self._users.setdefault(version.content, set()).add((entry.name, version.number))
        for alias in aliases:
            lost |= self._drop(alias.name)
            self._add(alias.name)
            self.aliases[alias.name] = alias
            for target in alias.targets:
                self._aliased.setdefault(target.adapter, set()).add(alias.name)
        return {content for content in lost if not self.refers_to(content)}

    def refers_to(self, content: AdapterId) -> bool:
        """Return whether some version has this content."""
        return content in self._users

    def version(self, reference: Reference) -> Version:
        """Return the version that a reference means. Raises :class:`UnknownAdapter`."""
        entry = self.entries.get(reference.name)
        number = entry.active if entry and reference.version is None else reference.version
        version = entry.versions.get(number) if entry and number is not None else None
        if version is None:
            raise UnknownAdapter(str(reference))
        return version

    def entries_after(self, after: str, limit: int | None) -> list[Entry]:
        """Return at most ``limit`` entries after ``after``, in the order of names."""
        start = bisect_right(self._order, after)
        names = (self._order[i] for i in range(start, len(self._order)))
        return list(islice((self.entries[name] for name in names if name in self.entries), limit))

    def aliases_after(self, after: str, limit: int | None) -> list[Alias]:
        """Return at most ``limit`` aliases after ``after``, in the order of names. Sorts them: there are few."""
        return [self.aliases[name] for name in sorted(self.aliases) if name > after][:limit]

    def servable(self, after: str, versions: bool) -> Iterator[tuple[str, Version | Alias]]:
        """Yield what a request may name after ``after``: each adapter, its ``versions`` if wanted, each alias."""
        last = parse_reference(after)
        start = bisect_left(self._order, last.name)
        for index in range(start, len(self._order)):
            name = self._order[index]
            for each, meant in self._names_of(name, versions):
                if name != last.name or (parse_reference(each).version or 0) > (last.version or 0):
                    yield each, meant

    def names_of(self, contents: Iterable[AdapterId]) -> list[str]:
        """Return the names of these contents: the adapter's name if the version is active, else the version's."""
        names = set()
        for content in contents:
            for name, number in self._users.get(content, ()):
                names.add(name if self.entries[name].active == number else str(Reference(name, number)))
        return sorted(names)

    def aliased_to(self, adapter: str) -> list[str]:
        """Return the aliases that have this adapter as a target."""
        return sorted(self._aliased.get(adapter, ()))

    def _names_of(self, name: str, versions: bool) -> Iterator[tuple[str, Version | Alias]]:
        alias = self.aliases.get(name)
        if alias is not None:
            yield name, alias
            return
        entry = self.entries[name]
        if entry.current is not None:
            yield name, entry.current
        for version in entry.versions.values() if versions else ():
            yield version.name, version

    def _add(self, name: str) -> None:
        insort(self._order, name)

    def _drop(self, name: str) -> set[AdapterId]:
        """Remove a name if it is known; return the contents it had."""
        entry, alias = self.entries.pop(name, None), self.aliases.pop(name, None)
        if entry is None and alias is None:
            return set()
        del self._order[bisect_left(self._order, name)]
        for adapter in {target.adapter for target in alias.targets} if alias else ():
            self._aliased[adapter].discard(name)
            if not self._aliased[adapter]:
                del self._aliased[adapter]
        versions = entry.versions.values() if entry else ()
        self.versions -= len(versions)
        self.pinned.discard(name)
        for version in versions:
            users = self._users[version.content]
            users.discard((name, version.number))
            if not users:
                del self._users[version.content]
        return {version.content for version in versions}
