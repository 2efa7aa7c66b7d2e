"""Backlog: how many requests and prompt tokens may wait for the engine. More get 429, before memory runs out."""

from collections.abc import Iterable
from threading import Lock
from time import monotonic

from server.engine.resilience.pace import Pace
from server.engine.sequence import Sequence
from server.errors import QueueFull


class Backlog:
    """The sequences that the engine has accepted. Any thread may call any method.

    A prompt's tokens count until its first step. A waiting prompt takes about 40 bytes of memory a token: a list of
    numbers, and the numbers themselves.
    """

    def __init__(self, max_waiting: int, max_running: int, max_tokens: int) -> None:
        """``max_tokens``: of all waiting prompts. A single prompt may be longer: if none waits, it is accepted."""
        self._max_unfinished = max_waiting + max_running
        self._max_tokens = max_tokens
        self._unfinished: set[str] = set()
        self._waiting: dict[str, int] = {}
        """Sequence id -> tokens of its prompt."""
        self._tokens = 0
        self._pace = Pace()
        self._lock = Lock()

    def __len__(self) -> int:
        """Number of unfinished sequences."""
        return len(self._unfinished)

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens of sequences that have not begun."""
        return self._tokens

    def admit(self, sequence: Sequence) -> None:
        """Count a new sequence. Raises QueueFull, with the seconds after which to try again, and counts nothing."""
        size = sequence.prompt_length
        with self._lock:
            if len(self._unfinished) >= self._max_unfinished:
                raise self._full("Too many requests are waiting; try again later.")
            if self._tokens and self._tokens + size > self._max_tokens:
                raise self._full("Too many prompt tokens are waiting; try again later.")
            self._unfinished.add(sequence.id)
            self._waiting[sequence.id] = size
            self._tokens += size
            self._pace.observe(len(self._waiting), 0, monotonic())

    def begin(self, sequence_ids: Iterable[str]) -> None:
        """Take in that these run in a step. They may have begun before."""
        with self._lock:
            self._leave(sequence_ids)

    def end(self, sequence_ids: Iterable[str]) -> None:
        """Drop sequences that have ended. Unknown ones are ignored."""
        with self._lock:
            ended = list(sequence_ids)
            self._leave(ended)
            self._unfinished.difference_update(ended)

    def _leave(self, sequence_ids: Iterable[str]) -> None:
        left = [size for id_ in sequence_ids if (size := self._waiting.pop(id_, None)) is not None]
        if left:
            self._tokens -= sum(left)
            self._pace.observe(len(self._waiting), len(left), monotonic())

    def _full(self, message: str) -> QueueFull:
        self._pace.observe(len(self._waiting), 0, monotonic())
        return QueueFull(message, code="queue_full", retry_after=self._pace.retry_after(len(self._waiting)))
