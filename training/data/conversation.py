"""The common form of all training rows, whatever format they are stored in."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bases.errors import ManyloraError


class DataError(ManyloraError):
    """Raised for data that cannot be trained on; names the row (``file.jsonl:12``) if one row is the cause."""

    exit_status = 2

    def __init__(self, reason: str, source: str | None = None) -> None:
        self.reason = reason
        self.source = source
        super().__init__(f"{source}: {reason}" if source else reason)


OnRowError = Callable[[DataError], None]
"""Handles the error of one row. If it returns, reading goes on with the next row; if it raises, reading ends."""


def raise_error(error: DataError) -> None:
    """Raise the first error."""
    raise error


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: str
    """``system``, ``user``, ``assistant`` or ``tool``."""
    content: str
    """May be empty only if there are ``tool_calls``."""
    trained: bool = False
    """Whether its tokens are trained on."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Further fields for the chat template: ``name``, ``tool_calls``, ``tool_call_id``."""

    def message(self) -> dict[str, Any]:
        """Return the message as a dict for a chat template."""
        return {"role": self.role, "content": self.content or None, **self.more}


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row: either ``turns``, the last of which is the assistant's, or ``text``."""

    source: str
    """File and row number, counted from 1: ``file.jsonl:12``."""
    turns: tuple[Turn, ...] = ()
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the functions the assistant may call."""
    prompt: str | None = None
    """The prompt that ``text`` completes; None if ``text`` is plain text."""
    text: str | None = None
    """Plain text or a completion; all of it is trained on."""
