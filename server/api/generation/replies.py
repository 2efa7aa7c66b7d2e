"""Answers on the wire: a generation as one JSON object, or as server-sent events, for as long as the client listens."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.generation.generation import Generation
from server.api.http.errors import Json, error_body
from server.api.schemas.generation import StreamOptions
from server.errors import Draining, EngineError

DONE = b"data: [DONE]\n\n"
_PLACE = "\0text\0"
"""Stands for the text in a chunk's template: no name that reaches it has a NUL."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How one endpoint's choices look."""

    whole_object: str
    chunk_object: str
    whole: Callable[[str], Mapping[str, Any]]
    """Text -> the fields of a choice in a whole answer."""
    piece: Callable[[str], Mapping[str, Any]]
    """Text -> the fields of a choice in a stream's chunk."""
    first: Mapping[str, Any] | None
    """Those of the chunk that opens a stream, if there is one."""
    last: Mapping[str, Any]
    """Those of the chunk that says why the answer ended."""


CHAT = Shape(
    "chat.completion",
    "chat.completion.chunk",
    whole=lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    piece=lambda text: {"delta": {"content": text}},
    first={"delta": {"role": "assistant", "content": ""}},
    last={"delta": {}},
)
COMPLETION = Shape(
    "text_completion",
    "text_completion",
    whole=lambda text: {"text": text},
    piece=lambda text: {"text": text},
    first=None,
    last={"text": ""},
)


def usage(generation: Generation) -> dict[str, Any]:
    """Tokens counted as OpenAI does; the stop token is one of the answer's."""
    return {
        "prompt_tokens": generation.prompt_tokens,
        "completion_tokens": generation.output_tokens,
        "total_tokens": generation.prompt_tokens + generation.output_tokens,
        "prompt_tokens_details": {"cached_tokens": generation.cached_tokens},
    }


def _choice(fields: Mapping[str, Any], finish: str | None) -> dict[str, Any]:
    return {"index": 0, **fields, "logprobs": None, "finish_reason": finish}


@dataclass(frozen=True, slots=True)
class Head:
    """What every object of one answer says."""

    id: str
    created: int
    model: str
    fingerprint: str
    adapter: list[dict[str, Any]]

    def fields(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "adapter": self.adapter,
        }

    def headers(self) -> dict[str, str]:
        """Which adapter contents served the answer."""
        applied = ";".join(f"{adapter['name']}={adapter['id']}" for adapter in self.adapter)
        return {"x-manylora-adapter": applied} if applied else {}


class WholeReply(Response):
    """One JSON object when the answer is complete."""

    def __init__(self, generation: Generation, head: Head, shape: Shape) -> None:
        super().__init__()
        self._generation = generation
        self._head = head
        self._shape = shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["generation"] = self._generation  # for the log
        await _while_connected(receive, self._generation, self._write(scope, receive, send))

    async def _write(self, scope: Scope, receive: Receive, send: Send) -> None:
        pieces = []
        while not self._generation.finish:
            pieces.append(await self._generation.read())
        body = {
            **self._head.fields(self._shape.whole_object),
            "choices": [_choice(self._shape.whole("".join(pieces)), self._generation.finish)],
            "usage": usage(self._generation),
        }
        await Json(body, headers=self._head.headers())(scope, receive, send)


class StreamReply(Response):
    """Server-sent events: a chunk for each step that brought text, one with the reason of the end, ``[DONE]``."""

    def __init__(self, generation: Generation, head: Head, shape: Shape, options: StreamOptions) -> None:
        super().__init__()
        self._generation = generation
        self._shape = shape
        self._continuous_usage = options.continuous_usage_stats
        self._include_usage = options.include_usage or self._continuous_usage
        self._fields = head.fields(shape.chunk_object) | ({"usage": None} if self._include_usage else {})
        # The text is all that differs from chunk to chunk; the engine's thread wants the time a whole dump would take.
        self._template = self._chunk(shape.piece(_PLACE), None).split(json.dumps(_PLACE).encode())
        self.headers.update(
            {
                "content-type": "text/event-stream; charset=utf-8",
                "cache-control": "no-cache",
                "x-accel-buffering": "no",  # nginx would collect the events
                **head.headers(),
            }
        )
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["generation"] = self._generation
        await _while_connected(receive, self._generation, self._write(send))

    async def _write(self, send: Send) -> None:
        opening = b"" if self._shape.first is None else self._chunk(self._shape.first, None)
        # A request that fails before its first token is still answered with a status of its own.
        text = await self._generation.read()
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await self._write_events(opening, text, send)
        except (EngineError, Draining) as error:
            await self._send(_event(error_body(error)[1]), send)
        await send({"type": "http.response.body", "body": b""})

    async def _write_events(self, chunk: bytes, text: str, send: Send) -> None:
        while True:
            if text:
                chunk += self._piece(text)
            if self._generation.finish:
                break
            if chunk:
                await self._send(chunk, send)
            chunk = b""
            text = await self._generation.read()
        await self._send(chunk + self._end(), send)

    def _end(self) -> bytes:
        end = self._chunk(self._shape.last, self._generation.finish)
        if self._include_usage:
            end += _event({**self._fields, "choices": [], "usage": usage(self._generation)})
        return end + DONE

    def _piece(self, text: str) -> bytes:
        if self._continuous_usage:
            return self._chunk(self._shape.piece(text), None)
        return json.dumps(text).encode().join(self._template)

    def _chunk(self, choice: Mapping[str, Any], finish: str | None) -> bytes:
        so_far = {"usage": usage(self._generation)} if self._continuous_usage else {}
        return _event({**self._fields, **so_far, "choices": [_choice(choice, finish)]})

    async def _send(self, body: bytes, send: Send) -> None:
        await send({"type": "http.response.body", "body": body, "more_body": True})


def _event(data: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


async def _while_connected(receive: Receive, generation: Generation, work: Awaitable[None]) -> None:
    """Await ``work``; when the client goes away first, cancel it. Either way the generation is closed."""
    writing = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((writing, gone), return_when=asyncio.FIRST_COMPLETED)
        if writing.done():
            writing.result()
    finally:
        generation.close()
        writing.cancel()
        gone.cancel()
        # Whatever else goes wrong from here on, nobody is left to be told.
        await asyncio.gather(writing, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
