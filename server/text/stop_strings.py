"""StopStrings: end a text at a stop string, without ever returning a part of one."""

from collections.abc import Sequence


class StopStrings:
    """Ends a text, given in pieces, before the stop string that is complete first."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.found = False
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> str:
        """Add a piece. Returns the text that cannot be part of a stop string; nothing more once ``found`` is set."""
        if self.found or not self._stops:
            return "" if self.found else piece
        text = self._held + piece
        ends = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:
            self.found = True
            self._held = ""
            return text[: min(ends)[1]]
        border = len(text) - self._partial_stop(text)
        self._held = text[border:]
        return text[:border]

    def flush(self) -> str:
        """Return the text that was held back: the beginning of a stop string that was not completed."""
        return self._held

    def _partial_stop(self, text: str) -> int:
        """Return the length of the longest suffix of ``text`` that is a proper prefix of a stop string."""
        longest = max(min(len(stop) - 1, len(text)) for stop in self._stops)
        for length in range(longest, 0, -1):
            end = text[-length:]
            if any(len(stop) > length and stop.startswith(end) for stop in self._stops):
                return length
        return 0
