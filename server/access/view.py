"""RegistryView: the registry as one key sees it. What the key does not see does not exist for it.

Whether it sees something depends on the name alone, never on what exists. So the answers to a name that it does not see
are the same whether there is such an adapter or not.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from adapters.errors import AdapterConflict, AdapterNameError, UnknownAdapter
from adapters.format.selection import Selection
from adapters.registry.catalog import Change, refuse_unknown
from adapters.registry.in_memory import Lease
from adapters.registry.names import Reference, parse_reference
from adapters.registry.registration import Registered, RegistrationOptions
from adapters.registry.registry import Registry, StoreUsage
from adapters.registry.snapshot import Alias, Entry, Target, Version
from server.access.key import ApiKey
from server.errors import Forbidden

T = TypeVar("T")

BATCH = 500
"""Number of names that are read from the registry at once to find those that a key sees."""


class RegistryView:
    """The part of a registry that a key sees, with the methods of :class:`~adapters.registry.registry.Registry`.

    They raise UnknownAdapter for what the key does not see. An alias that it sees may mean adapters that it does not:
    requests may use them by the alias.
    """

    def __init__(self, registry: Registry, key: ApiKey) -> None:
        self._registry = registry
        self._key = key

    def sees(self, name: str) -> bool:
        """Return whether the key sees the adapter or alias ``name`` (without a version)."""
        return self._key.sees(name)

    # Queries

    def entry(self, name: str) -> Entry:
        """Return the adapter."""
        self._require(name)
        return self._registry.entry(name)

    def alias(self, name: str) -> Alias:
        """Return the alias."""
        self._require(name)
        return self._registry.alias(name)

    def version(self, reference: str) -> Version:
        """Return the version that ``legal`` or ``legal@2`` means."""
        self._require_reference(reference)
        return self._registry.version(reference)

    def receipt(self, version: Version) -> dict[str, Any] | None:
        """Return the results of a version's checks, and its origin. Queries the database."""
        return self._registry.receipt(version)

    def knows(self, reference: str) -> bool:
        """Return whether a request may name it."""
        return self._key.sees(reference.partition("@")[0]) and self._registry.knows(reference)

    def entries(self, after: str = "", limit: int | None = None) -> list[Entry]:
        """Return the adapters after ``after``, in the order of their names."""
        return self._page(self._registry.entries, lambda entry: entry.name, after, limit)

    def aliases(self, after: str = "", limit: int | None = None) -> list[Alias]:
        """Return the aliases after ``after``, in the order of their names."""
        return self._page(self._registry.aliases, lambda alias: alias.name, after, limit)

    def names(
        self, after: str = "", limit: int | None = None, *, versions: bool = True
    ) -> list[tuple[str, Version | Alias]]:
        """Return what a request may name, in order: adapters, with ``versions`` each of their versions, and aliases."""

        def read(after: str, limit: int | None) -> list[tuple[str, Version | Alias]]:
            return self._registry.names(after, limit, versions=versions)

        return self._page(read, lambda named: named[0], after, limit)

    def aliased_to(self, name: str) -> list[str]:
        """Return the aliases that have this adapter as a target."""
        return [alias for alias in self._registry.aliased_to(name) if self._key.sees(alias)]

    def usage(self) -> StoreUsage:
        """Return how much is registered: all of it, or the weights of what the key sees if it does not see all."""
        usage = self._registry.usage()
        if self._key.adapters is None:
            return usage
        entries = self.entries()
        versions = [version for entry in entries for version in entry.versions.values()]
        sizes = {version.content: version.size_bytes for version in versions}
        return StoreUsage(sum(sizes.values()), usage.quota_bytes, len(entries), len(versions))

    # Leases

    def acquire(self, references: Sequence[str], user: str | None = None) -> tuple[Lease, ...]:
        """Resolve all names atomically and return a lease for each, or raise and lease none."""
        for reference in references:
            self._require_reference(reference)
        return self._registry.acquire(references, user)

    def release(self, leases: Sequence[Lease]) -> None:
        """Release the leases of :meth:`acquire`, once."""
        self._registry.release(leases)

    # Changes

    def check_may_register(self, name: str) -> None:
        """Raise Forbidden if the key does not see ``name``, whether it exists or not."""
        if not self._key.sees(name):
            raise Forbidden(f"This API key may not use the name `{name}`.", param="name")

    def register(
        self, name: str, staging: Path, source: str, options: RegistrationOptions, selection: Selection
    ) -> Registered:
        """Verify the files in ``staging``, store them, and add them to ``name``."""
        self.check_may_register(name)
        with self._hiding():
            return self._registry.register(name, staging, source, options, selection)

    def register_folder(self, name: str, folder: Path, options: RegistrationOptions) -> Registered:
        """Copy a PEFT folder into the store and register the copy."""
        self.check_may_register(name)
        with self._hiding():
            return self._registry.register_folder(name, folder, options)

    def activate(self, name: str, number: int, expected: int | None = None) -> Entry:
        """Make another version of ``name`` the active one."""
        self._require_changeable(name, expected)
        return self._registry.activate(name, number, expected)

    def pin(self, name: str, pinned: bool, expected: int | None = None) -> Entry:
        """Pin the active version to the device, or unpin it."""
        self._require_changeable(name, expected)
        return self._registry.pin(name, pinned, expected)

    def remove(self, reference: str, expected: int | None = None) -> None:
        """Remove an adapter, or one version (``legal@1``)."""
        self._require_changeable(parse_reference(reference).name, expected)
        with self._hiding():
            self._registry.remove(reference, expected)

    def put_alias(self, name: str, targets: Sequence[Target], expected: int | None = None) -> tuple[Alias, bool]:
        """Create or replace an alias; return it, and whether it is new."""
        self.check_may_register(name)
        for target in targets:
            self._require(target.adapter)
        with self._hiding():
            return self._registry.put_alias(name, targets, expected)

    def remove_alias(self, name: str, expected: int | None = None) -> None:
        """Remove an alias."""
        self._require_changeable(name, expected)
        self._registry.remove_alias(name, expected)

    def _require(self, name: str) -> None:
        if not self._key.sees(name):
            raise UnknownAdapter(name)

    def _require_reference(self, text: str) -> None:
        reference: Reference = parse_reference(text)
        if not self._key.sees(reference.name):
            raise UnknownAdapter(str(reference))

    def _require_changeable(self, name: str, expected: int | None) -> None:
        if not self._key.sees(name):
            refuse_unknown(Change(name, expected))

    @contextmanager
    def _hiding(self) -> Iterator[None]:
        """Leave the names that the key does not see out of errors."""
        try:
            yield
        except (AdapterConflict, AdapterNameError) as error:
            raise hide_other(error, self._key) from None

    def _page(
        self, read: Callable[[str, int | None], list[T]], name: Callable[[T], str], after: str, limit: int | None
    ) -> list[T]:
        """Read until there are ``limit`` items that the key sees, or no more at all."""
        if self._key.adapters is None:
            return read(after, limit)
        found: list[T] = []
        while limit is None or len(found) < limit:
            batch = read(after, BATCH)
            found += [item for item in batch if self._key.sees(name(item).partition("@")[0])]
            if len(batch) < BATCH:
                break
            after = name(batch[-1])
        return found[:limit]


def hide_other(error: AdapterConflict | AdapterNameError, key: ApiKey) -> AdapterConflict | AdapterNameError:
    """Return the error, or one that does not name what the key does not see."""
    if error.other is None or key.sees(error.other):
        return error
    reason = "it conflicts with a name that this API key does not see"
    if isinstance(error, AdapterConflict):
        return AdapterConflict(reason, code=error.code)
    return AdapterNameError(reason)
