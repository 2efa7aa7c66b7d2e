"""RegistrationLimits: how many adapters may be uploaded and registered at the same time."""

from asyncio import Semaphore
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from anyio import CapacityLimiter

MAX_UPLOADS = 16
"""Maximum number of simultaneous uploads. Each may take the size of the largest adapter on disk, outside any quota."""
MAX_REGISTRATIONS = 32
"""Maximum number of registrations that run on threads at the same time; more wait."""


@dataclass(slots=True)
class RegistrationLimits:
    """Limits and counts uploads and registrations. Use on the event loop only."""

    uploads: Semaphore = field(default_factory=lambda: Semaphore(MAX_UPLOADS))
    registrations: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(MAX_REGISTRATIONS))
    """A limiter separate from the default one: a download may take an hour, and a rollback must not wait for it."""
    in_progress: int = 0
    """Number of unfinished uploads and registrations, including those whose client has disconnected. A draining server
    waits for all of them."""

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count one more upload or registration as in progress within this context."""
        self.in_progress += 1
        try:
            yield
        finally:
            self.in_progress -= 1
