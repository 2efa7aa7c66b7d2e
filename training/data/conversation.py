"""What every row of training data becomes, whatever format it came in."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bases.errors import ManyloraError


class DataError(ManyloraError):
    """Data that cannot be trained on, with the row (``file.jsonl:12``) where it is one row's fault."""

    def __init__(self, reason: str, source: str | None = None) -> None:
        self.reason = reason
        self.source = source
        super().__init__(f"{source}: {reason}" if source else reason)


OnRowError = Callable[[DataError], None]
"""Gets the reason why a row cannot be trained on. Where it raises, reading ends there; else with the next row."""


def raise_error(error: DataError) -> None:
    """Raises the first reason."""
    raise error


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: str
    """``system``, ``user``, ``assistant`` or ``tool``."""
    content: str
    """Empty only beside ``tool_calls``."""
    trained: bool = False
    """Whether the loss is taken on it."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """What else the chat template gets: ``name``, ``tool_calls``, ``tool_call_id``."""

    def message(self) -> dict[str, Any]:
        """As chat templates want it."""
        return {"role": self.role, "content": self.content or None, **self.more}


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row: either ``turns``, which end with the assistant's, or ``text``."""

    source: str
    """File and row, from 1: ``file.jsonl:12``."""
    turns: tuple[Turn, ...] = ()
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the functions the assistant may call."""
    prompt: str | None = None
    """What ``text`` completes; None where ``text`` is plain text."""
    text: str | None = None
    """All of it is trained."""
