"""Pace: how fast requests leave the queue, to tell those that find it full when to come back. No clock of its own."""

from collections import deque
from math import ceil, inf

WINDOW = 30.0
"""Seconds that are looked back on. Only those count in which requests waited: an idle queue says nothing."""
MIN_SECONDS = 1
MAX_SECONDS = 60
"""Bounds of what clients are told."""


class Pace:
    """When requests left the queue, by a clock that runs only while some wait. For one thread at a time."""

    def __init__(self) -> None:
        self._busy = 0.0
        """Seconds so far in which requests waited."""
        self._since: float | None = None
        """When :meth:`observe` last found some waiting; None if it found none."""
        self._left: deque[float] = deque()
        """The times in ``_busy`` at which those of the window left."""

    def observe(self, waiting: int, left: int, now: float) -> None:
        """Take in that ``left`` requests have just left, and that ``waiting`` wait from ``now`` (monotonic) on."""
        if self._since is not None:
            self._busy += max(now - self._since, 0.0)
        self._since = now if waiting else None
        self._left.extend([self._busy] * left)
        while self._left and self._left[0] < self._busy - WINDOW:
            self._left.popleft()

    def rate(self) -> float:
        """How many requests a second have left lately; infinite if some have left and none had to wait."""
        if not self._left:
            return 0.0
        looked_back = min(self._busy, WINDOW)
        return len(self._left) / looked_back if looked_back else inf

    def retry_after(self, waiting: int) -> int:
        """Whole seconds after which half of ``waiting`` requests will have left, within the bounds.

        Half, so that the queue is not empty by the time that those return which it had no room for.
        """
        rate = self.rate()
        seconds = waiting / 2 / rate if rate else inf
        return ceil(min(max(seconds, MIN_SECONDS), MAX_SECONDS))
