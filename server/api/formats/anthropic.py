"""MessagesFormat: answers of ``POST /v1/messages``."""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from typing import Any

from server.api.formats.answer import Answer
from server.api.formats.format import comment, read_deltas, typed_events
from server.api.formats.message_events import Json, MessageEvents
from server.api.generation.generation import Generation
from server.api.generation.pieces import Finish, Piece
from server.api.http.anthropic_errors import anthropic_error
from server.api.http.errors import error_body
from server.parsers.deltas import MessageParser, PlainText


class MessagesFormat:
    """A message with blocks, or Anthropic's events. The whole answer is what the events add up to."""

    def __init__(self, answer: Answer, make_parser: Callable[[], MessageParser] = PlainText) -> None:
        self.generation: Generation = answer.generation
        """The request whose answer this writes."""
        self._answer = answer
        self._parser = make_parser()
        self._events = MessageEvents()
        self._finish: Finish | None = None
        self._began = False

    def body(self, answers: Seq[Piece]) -> Mapping[str, Any]:
        """Return the message."""
        self._take(answers[0])
        self._events.end()
        end = {**self._stop(), "usage": self._usage(), **self._answer.explanation()}
        return {**self._message(), "content": self._events.blocks, **end}

    def begin(self) -> bytes:
        """Return ``message_start`` and ``ping``."""
        usage = {**self._usage(), "output_tokens": 0}
        message = {**self._message(), "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        return typed_events([{"type": "message_start", "message": message}, {"type": "ping"}])

    def push(self, index: int, piece: Piece) -> bytes:
        """Return the events of a piece."""
        self._began = True
        return typed_events(self._take(piece))

    def end(self) -> bytes:
        """Return the events that end the last block, ``message_delta`` and ``message_stop``."""
        delta = {"type": "message_delta", "delta": self._stop(), "usage": self._usage(), **self._answer.explanation()}
        return typed_events([*self._events.end(), delta, {"type": "message_stop"}])

    def error(self, error: Exception) -> bytes:
        """Return an ``error`` event."""
        status, body = error_body(error)
        return typed_events([anthropic_error(status, body)])

    def waiting(self) -> bytes:
        """Return ``ping``, or before ``message_start`` a comment."""
        return typed_events([{"type": "ping"}]) if self._began else comment("waiting")

    def _take(self, piece: Piece) -> list[Json]:
        self._finish = piece.finish
        return [each for delta in read_deltas(self._parser, piece) for each in self._events.add(delta)]

    def _message(self) -> Json:
        head = self._answer.head("message")
        id_ = f"msg_{self.generation.id.rpartition('-')[2]}"
        kept = {name: head[name] for name in ("model", "system_fingerprint", "adapter")}
        return {"id": id_, "type": "message", "role": "assistant", **kept}

    def _stop(self) -> Json:
        """Return why the message ended."""
        assert self._finish is not None
        if self._finish.reason == "length":
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if isinstance(self._finish.stop, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": self._finish.stop}
        return {"stop_reason": "tool_use" if self._parser.has_tool_calls else "end_turn", "stop_sequence": None}

    def _usage(self) -> Json:
        """Return token counts as Anthropic reports them: those from the cache are not in ``input_tokens``."""
        usage = self._answer.usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"] - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": usage["completion_tokens"],
        }
