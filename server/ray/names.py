"""Names: the contents that names mean, followed in the registry's database, so that a request can be routed by them."""

import logging
import threading
from collections.abc import Sequence

from adapters.errors import AdapterError, UnknownAdapter
from adapters.registry.canary import choose_target
from adapters.registry.catalog import Catalog
from adapters.registry.database import Database
from adapters.registry.names import parse_reference
from adapters.registry.registry import POLL_SECONDS
from adapters.registry.snapshot import Alias, Snapshot
from server.follower import Follower

_log = logging.getLogger(__name__)

STALE = "Requests are routed by the names of the last reading"
"""What holds while the database cannot be read."""


class Names:
    """A snapshot of a registry's names that only looks. Any thread may use it.

    It decides where a request goes, never what it gets: the replica resolves the names again, with the request's key.
    """

    def __init__(self, database: Database) -> None:
        """Read all names. Raises RegistryUnavailable."""
        self._catalog = Catalog(database, lambda ranks: True, max_rank=0)  # neither matters to one that only reads
        self._refreshing = threading.Lock()
        """Held while the database is read, which may be slow."""
        self._lock = threading.Lock()
        """Held only for a moment: :meth:`contents` takes it on an event loop."""
        self._snapshot = Snapshot()
        self._revision = -1
        self._follower = Follower("names", self.refresh, POLL_SECONDS, STALE, _log)
        self.refresh()

    def refresh(self) -> None:
        """Read what has changed. Queries the database; raises RegistryUnavailable."""
        with self._refreshing:
            changes = self._catalog.load(self._revision, base="")
            restored = changes.revision < self._revision  # from a backup
            if restored:
                changes = self._catalog.load(-1, base="")
            with self._lock:
                if restored:
                    self._snapshot = Snapshot()
                self._snapshot.apply(changes.entries, changes.aliases, changes.gone)
            self._revision = changes.revision

    def contents(self, names: Sequence[str], user: str | None = None) -> tuple[str, ...]:
        """Return the contents that the names mean, each once; nothing for a name that is not known, as the base's.

        An alias without a ``user`` means its heaviest target: the replica draws one by weight. An address is its own
        content: wherever it goes first, it will be registered and held.
        """
        with self._lock:
            found = [self._content(name, user) for name in names]
        return tuple(dict.fromkeys(content for content in found if content is not None))

    def _content(self, name: str, user: str | None) -> str | None:
        alias = self._snapshot.aliases.get(name)
        reference = name if alias is None else _target(alias, user)
        try:
            return self._snapshot.version(parse_reference(reference)).content
        except (UnknownAdapter, AdapterError):
            return name if "://" in name else None

    def start(self) -> None:
        """Start the thread that follows changes."""
        self._follower.start()

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._follower.close()


def _target(alias: Alias, user: str | None) -> str:
    if user is not None:
        return choose_target(alias, user).reference
    return max(alias.targets, key=lambda target: target.weight).reference
