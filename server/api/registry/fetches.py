"""Fetches: adapters that are being fetched for requests that named their addresses, and what came of earlier ones."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from adapters.errors import AdapterError, RegistryUnavailable
from server.errors import QueueFull

MAX_FETCHES = 16
"""Maximum number of adapters that are fetched at the same time; requests for more get 429."""
REFUSAL_SECONDS = 30.0
"""How long a refusal is repeated without another download: clients retry, and each try would download everything."""
MAX_REFUSALS = 1024
MAX_VERSIONS = 4096
"""Names whose versions are remembered, the last ones. Others are looked up in the database again."""


@dataclass(slots=True)
class Fetches:
    """Use on the event loop only."""

    versions: dict[str, str] = field(default_factory=dict)
    """Name -> the version of it that is known to come from its address; at most :data:`MAX_VERSIONS`."""
    _running: dict[str, asyncio.Task[str]] = field(default_factory=dict)
    _refusals: dict[str, tuple[float, AdapterError]] = field(default_factory=dict)
    """Name -> when its last fetch was refused (monotonic), and why."""

    async def run(self, name: str, fetch: Callable[[], Coroutine[Any, Any, str]]) -> None:
        """Run ``fetch`` for ``name``, or wait for the one that is running. It continues if the caller is cancelled.

        ``fetch`` returns the version that it has registered.

        Raises the errors of ``fetch``, also those of the last :data:`REFUSAL_SECONDS`, and QueueFull.
        """
        since, error = self._refusals.get(name, (0.0, None))
        if error is not None and monotonic() < since + REFUSAL_SECONDS:
            raise error.with_traceback(None)
        task = self._running.get(name)
        if task is None:
            if len(self._running) >= MAX_FETCHES:
                raise QueueFull("Too many adapters are being fetched; try again later.", code="too_many_fetches")
            task = self._running[name] = asyncio.create_task(fetch())
            task.add_done_callback(lambda task: self._ended(name, task))
        await asyncio.shield(task)

    def _ended(self, name: str, task: asyncio.Task[str]) -> None:
        del self._running[name]
        self._refusals.pop(name, None)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, AdapterError) and not isinstance(error, RegistryUnavailable):
            while len(self._refusals) >= MAX_REFUSALS:
                del self._refusals[next(iter(self._refusals))]
            self._refusals[name] = monotonic(), error
        if not task.cancelled() and error is None:
            self.versions.pop(name, None)
            while len(self.versions) >= MAX_VERSIONS:
                del self.versions[next(iter(self.versions))]
            self.versions[name] = task.result()
