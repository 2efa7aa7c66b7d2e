"""What clients of a soak did, and what must not have happened."""

from collections import Counter
from dataclasses import dataclass, field

MOST_REASONS = 50
"""Violations that are kept in words; all are counted."""


@dataclass(slots=True)
class Ledger:
    """Counts of one soak."""

    done: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(kind of request, outcome) -> how often. An outcome is a status, or ``left`` for a client that went away."""
    compared: int = 0
    """Answers that were compared with their solo runs."""
    violations: int = 0
    reasons: list[str] = field(default_factory=list)

    @property
    def requests(self) -> int:
        """How many requests have ended."""
        return sum(self.done.values())

    def count(self, kind: str, outcome: int | str) -> None:
        """Count a request that has ended as it may."""
        self.done[kind, str(outcome)] += 1

    def violate(self, reason: str) -> None:
        """Record something that must not happen."""
        self.violations += 1
        if len(self.reasons) < MOST_REASONS:
            self.reasons.append(reason)
