"""ResponsesFormat: answers of ``POST /v1/responses``."""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from time import time
from typing import Any

from server.api.formats.answer import Answer
from server.api.formats.format import comment, read_deltas, typed_events
from server.api.formats.logprobs import ContentLogprobs
from server.api.formats.response_events import Json, ResponseEvents, Status
from server.api.generation.generation import Generation
from server.api.generation.pieces import Finish, Piece
from server.api.http.errors import error_body
from server.api.schemas.responses_api.requests import ResponsesRequest
from server.parsers.deltas import ContentDelta, Delta, MessageParser, PlainText
from server.text.token_text import TokenTexts


class ResponsesFormat:
    """A response object with items, or OpenAI's typed events. The whole answer is what the events add up to."""

    def __init__(
        self,
        answer: Answer,
        request: ResponsesRequest,
        texts: TokenTexts,
        make_parser: Callable[[], MessageParser] = PlainText,
    ) -> None:
        self.generation: Generation = answer.generation
        """The request whose answer this writes."""
        self._answer = answer
        self._request = request
        self._parser = make_parser()
        self._logprobs: ContentLogprobs | None = None
        if request.includes_logprobs:
            self._logprobs = ContentLogprobs(request.top_logprobs or 0, texts, self.generation.kept)
        self._events = ResponseEvents(self._response)
        self._finish: Finish | None = None
        self._error: Json | None = None
        self._id = f"resp_{answer.generation.id.rpartition('-')[2]}"
        self._echo = _echo(request)

    def body(self, answers: Seq[Piece]) -> Mapping[str, Any]:
        """Return the response object."""
        self._take(answers[0])
        self._events.end(self._status)
        return self._response(self._status, self._events.items)

    def begin(self) -> bytes:
        """Return ``response.created`` and ``response.in_progress``."""
        return typed_events(self._events.start())

    def push(self, index: int, piece: Piece) -> bytes:
        """Return the events of a piece."""
        return typed_events(self._take(piece))

    def end(self) -> bytes:
        """Return the events that end the last item, and ``response.completed`` or ``response.incomplete``."""
        return typed_events(self._events.end(self._status))

    def error(self, error: Exception) -> bytes:
        """Return ``response.failed``."""
        status, body = error_body(error)
        code = "server_error" if status >= 500 else "invalid_prompt"  # of OpenAI's codes, the one for requests
        self._error = {"code": code, "message": body["error"]["message"]}
        return typed_events(self._events.end("failed"))

    def waiting(self) -> bytes:
        """Return a comment."""
        return comment("waiting")

    @property
    def _status(self) -> Status:
        assert self._finish is not None
        return "incomplete" if self._finish.reason == "length" else "completed"

    def _take(self, piece: Piece) -> list[Json]:
        self._finish = piece.finish
        if self._logprobs is not None:
            shown = len(piece.tokens) - piece.hidden
            self._logprobs.push(piece.tokens[:shown], piece.logprobs[:shown])
        return [each for delta in read_deltas(self._parser, piece) for each in self._add(delta)]

    def _add(self, delta: Delta) -> list[Json]:
        if self._logprobs is None or not isinstance(delta, ContentDelta):
            return self._events.add(delta)
        return self._events.add(delta, self._logprobs.take(delta))

    def _response(self, status: Status, items: list[Json]) -> Json:
        ended = status != "in_progress"
        head = self._answer.head("response")
        return {
            "id": self._id,
            "object": "response",
            "created_at": head["created"],
            "completed_at": int(time()) if status == "completed" else None,
            "status": status,
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": head["model"],
            "system_fingerprint": head["system_fingerprint"],
            "adapter": head["adapter"],
            "output": items,
            "usage": self._usage() if ended else None,
            **(self._answer.explanation() if ended else {}),
            **self._echo,
        }

    def _usage(self) -> Json:
        usage = self._answer.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }


def _echo(request: ResponsesRequest) -> Json:
    """Return the fields of a response that repeat the request."""
    given = request.model_dump(by_alias=True, exclude_none=True)
    return {
        "background": False,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": None,
        "metadata": request.metadata or {},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": request.reasoning and request.reasoning.effort, "summary": None},
        "store": False,
        "temperature": request.temperature,
        "text": given.get("text") or {"format": {"type": "text"}},
        "tool_choice": given.get("tool_choice", "auto"),
        "tools": [{"parameters": None, "strict": None, **tool} for tool in given.get("tools", [])],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": request.top_p,
        "truncation": "disabled",
        "user": request.user,
    }
