"""Deadlines: which unfinished sequences have passed theirs, and which cannot meet theirs any more."""

import math
from collections.abc import Iterable

from server.engine.sequence import Batch, Sequence


class Deadlines:
    """The next deadline of all sequences, so that most steps need not look for one, and the speed of steps."""

    def __init__(self, max_tokens: int) -> None:
        """``max_tokens``: those of a full step."""
        self._max_tokens = max_tokens
        self._next = math.inf
        self._token_seconds = 0.0
        """Least time for a token that a full step has taken; 0 before the first one."""

    def add(self, sequence: Sequence) -> None:
        """Note the deadline of a new sequence, if it has one."""
        if sequence.deadline is not None:
            self._next = min(self._next, sequence.deadline)

    def passed(self, unfinished: Iterable[Sequence], now: float) -> list[Sequence]:
        """Return those of ``unfinished``, all sequences, whose deadlines have passed."""
        if now < self._next:
            return []
        timed = [(sequence.deadline, sequence) for sequence in unfinished if sequence.deadline is not None]
        self._next = min((deadline for deadline, _ in timed if deadline > now), default=math.inf)
        return [sequence for deadline, sequence in timed if deadline <= now]

    def is_hopeless(self, sequence: Sequence, now: float) -> bool:
        """Whether a sequence that has its prefix hits cannot have its first token in time.

        By half of the least time that a token has ever taken: a sequence that could meet its deadline is not dropped.
        """
        if sequence.deadline is None:
            return False
        return now + (len(sequence.tokens) - sequence.computed) * self._token_seconds / 2 > sequence.deadline

    def record_step(self, batch: Batch, seconds: float) -> None:
        """Take in how long a step took."""
        if batch.tokens >= self._max_tokens:
            least = seconds / batch.tokens
            self._token_seconds = min(self._token_seconds, least) if self._token_seconds else least
