"""Deltas: the parts of an assistant's message, in the order in which a parser finds them in the text."""

from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """More of the message's content."""

    text: str
    start: int = field(default=0, compare=False)
    """Characters of the answer before it, reasoning, calls and markers included."""


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of the reasoning before the content."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A new tool call, or more of the arguments of the last one."""

    index: int
    """Which call of the message, from 0."""
    id: str | None
    """Only in the first delta of a call, as is ``name``."""
    name: str | None
    arguments: str
    """More of the arguments: all together are a JSON object."""


Delta = ContentDelta | ReasoningDelta | ToolCallDelta


class MessageParser(Protocol):
    """Splits the text of one message, given in pieces, into deltas. Holds back text that it cannot assign yet."""

    def push(self, text: str) -> list[Delta]:
        """Add a piece. Returns the deltas that are certain now."""
        ...

    def finish(self) -> list[Delta]:
        """Return the deltas of the text that was held back. Nothing is pushed after it."""
        ...

    @property
    def has_tool_calls(self) -> bool:
        """Whether a tool call was found."""
        ...


class PlainText:
    """A parser for messages that are content only."""

    has_tool_calls = False

    def __init__(self) -> None:
        self._length = 0

    def push(self, text: str) -> list[Delta]:
        """Return the piece as content."""
        self._length += len(text)
        return [ContentDelta(text, self._length - len(text))] if text else []

    def finish(self) -> list[Delta]:
        """Return nothing: no text is held back."""
        return []
