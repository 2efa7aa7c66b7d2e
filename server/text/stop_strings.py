"""StopStrings: end a text at a stop string, without ever returning a part of one."""

from collections.abc import Sequence


class StopStrings:
    """Ends a text, given in pieces, before the stop string that is complete first."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """``include``: end the text after the stop string."""
        self.stop: str | None = None
        """The stop string that was found."""
        self._stops = tuple(stops)
        self._include = include
        self._held = ""

    @property
    def found(self) -> bool:
        """Whether a stop string was found."""
        return self.stop is not None

    @property
    def held(self) -> int:
        """Number of characters that are held back."""
        return len(self._held)

    def push(self, piece: str) -> str:
        """Add a piece. Returns the text that cannot be part of a stop string; nothing more once ``found`` is set."""
        if self.stop is not None or not self._stops:
            return "" if self.stop is not None else piece
        text = self._held + piece
        ends = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:
            end, start, self.stop = min(ends)
            self._held = ""
            return text[: end if self._include else start]
        border = len(text) - self._partial_stop(text)
        self._held = text[border:]
        return text[:border]

    def flush(self) -> str:
        """Return the text that was held back: the beginning of a stop string that was not completed."""
        held, self._held = self._held, ""
        return held

    def _partial_stop(self, text: str) -> int:
        """Return the length of the longest suffix of ``text`` that is a proper prefix of a stop string."""
        longest = max(min(len(stop) - 1, len(text)) for stop in self._stops)
        for length in range(longest, 0, -1):
            end = text[-length:]
            if any(len(stop) > length and stop.startswith(end) for stop in self._stops):
                return length
        return 0
