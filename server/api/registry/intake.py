"""Intake: how many adapters may be on their way in at once."""

from asyncio import Semaphore
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from anyio import CapacityLimiter

MAX_UPLOADS = 16
"""Uploads at once. Each takes up to the largest adapter's bytes on the disk, which no quota counts yet."""
MAX_REGISTRATIONS = 32
"""Registrations that have a thread at once; others wait."""


@dataclass(slots=True)
class Intake:
    """Places for those who bring adapters. Used on the event loop only."""

    uploads: Semaphore = field(default_factory=lambda: Semaphore(MAX_UPLOADS))
    registrations: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(MAX_REGISTRATIONS))
    """Of their own: a download may take an hour, and rolling back must not wait for that."""
    under_way: int = 0
    """Uploads and registrations that have begun and not ended, with or without their clients: each counts once, and a
    server that drains waits for all of them."""

    @contextmanager
    def counted(self) -> Iterator[None]:
        """One more is under way."""
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1
