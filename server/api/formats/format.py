"""AnswerFormat: what an endpoint decides about writing its answers."""

import json
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from typing import Any, Protocol

from server.api.generation.generation import Generation
from server.api.generation.pieces import Piece
from server.parsers.deltas import Delta, MessageParser


class AnswerFormat(Protocol):
    """Writes the answer to one request, either whole (``body``) or as a stream (all else). Made for one request.

    A format may keep state between calls, such as a parser for each choice. It never waits.
    """

    @property
    def generation(self) -> Generation:
        """The request whose answer it writes."""
        ...

    def body(self, answers: Seq[Piece]) -> Mapping[str, Any]:
        """Return the JSON object of the whole answer. ``answers`` are the joined pieces of each choice."""
        ...

    def begin(self) -> bytes:
        """Return the events that open a stream. They are sent with the first piece."""
        ...

    def push(self, index: int, piece: Piece) -> bytes:
        """Return the events for the next piece of a choice, which may be none. The last one has ``finish``."""
        ...

    def end(self) -> bytes:
        """Return the events after the last piece of all choices."""
        ...

    def error(self, error: Exception) -> bytes:
        """Return the events of a stream that ends with an error."""
        ...

    def waiting(self) -> bytes:
        """Return what is sent when nothing has come for some seconds: a comment, or an event with the progress."""
        ...


def event(data: Mapping[str, Any], name: str | None = None) -> bytes:
    """Return a server-sent event. ``name`` is its type, which OpenAI's older endpoints do not use."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


def typed_events(events: Iterable[Mapping[str, Any]]) -> bytes:
    """Return server-sent events that have the name of their ``type``."""
    return b"".join([event(each, each["type"]) for each in events])


def read_deltas(parser: MessageParser, piece: Piece) -> list[Delta]:
    """Return the deltas of a choice's next piece; with its last one, also those that the parser has held back."""
    return [*parser.push(piece.text), *(parser.finish() if piece.finish else ())]


def comment(text: str) -> bytes:
    """Return a comment, which clients ignore: it only shows that the connection is alive."""
    return b": " + text.encode() + b"\n\n"
