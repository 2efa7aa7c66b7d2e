"""RowLimit: how many rows a step may have. Fewer after memory ran out, then more again, for it may be free by then."""

from math import inf

GROW_SECONDS = 10.0
"""After this time without a failure the limit doubles."""


class RowLimit:
    """At most ``full`` rows. Times are ``time.monotonic()``."""

    def __init__(self, full: int) -> None:
        self._full = full
        self._rows = full
        self._grow_at = inf

    def shrink(self, rows: int, now: float) -> None:
        """Memory ran out, and was enough for ``rows`` rows."""
        self._rows = min(max(rows, 1), self._rows)
        self._grow_at = now + GROW_SECONDS

    def rows(self, now: float) -> int:
        """Return the limit of the next step."""
        if now >= self._grow_at:
            self._rows = min(2 * self._rows, self._full)
            self._grow_at = inf if self._rows == self._full else now + GROW_SECONDS
        return self._rows
