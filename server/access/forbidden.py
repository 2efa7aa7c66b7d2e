"""ForbiddenLog: requests that a key may not make, for the audit log."""

import logging
from asyncio import get_running_loop
from collections.abc import Callable

from adapters.registry import audit
from adapters.registry.audit import Actor
from adapters.registry.database import Database
from server.access.limits import Bucket

log = logging.getLogger(__name__)

MAX_PER_MINUTE = 60
"""Entries a minute. Whoever has a key could fill the disk with more; those are in the log only."""
MAX_PATH = 200
"""Maximum number of characters of a path that are kept."""


class ForbiddenLog:
    """Adds entries to the audit log of ``database``. For the event loop; ``clock`` returns seconds."""

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock
        self._left = Bucket(MAX_PER_MINUTE, clock())

    def note(self, actor: Actor, method: str, path: str) -> None:
        """Record that ``actor`` has made a request that its key does not allow. Returns before it is written."""
        log.warning("Forbidden to the key %s: %.20s %.200r from %s", actor.name, method, path, actor.address)
        now = self._clock()
        if self._left.wait(1, now) == 0:
            self._left.take(1, now)
            get_running_loop().run_in_executor(None, self._write, actor, method, path)

    def _write(self, actor: Actor, method: str, path: str) -> None:
        try:
            with self._database.adding() as connection:
                at = self._database.now(connection)
                audit.write(connection, at, actor, "request.forbidden", path[:MAX_PATH], {"method": method[:20]})
        except Exception:
            log.exception("The audit log could not be written: %s is missing from it", actor)
