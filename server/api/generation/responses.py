"""Write a generation to the client: as one JSON object, or as a stream of server-sent events."""

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.generation.generation import Generation
from server.api.http.errors import JsonResponse, error_body
from server.api.schemas.generation import StreamOptions
from server.errors import Draining, EngineError

DONE = b"data: [DONE]\n\n"
_PLACEHOLDER = "\0text\0"
"""Marks the text's place in a chunk's template. It occurs nowhere else in a chunk, for names may not contain NUL."""


@dataclass(frozen=True, slots=True)
class EndpointFormat:
    """What differs between chat completions and completions on the wire."""

    id_prefix: str
    prompt_field: str
    """Request field that holds the prompt."""
    full_object: str
    """``object`` of a full response."""
    chunk_object: str
    """``object`` of a stream's chunk."""
    full_choice: Callable[[str], Mapping[str, Any]]
    """Text -> fields of the choice in a full response."""
    chunk_choice: Callable[[str], Mapping[str, Any]]
    """Text -> fields of the choice in a chunk."""
    first_choice: Mapping[str, Any] | None
    """Fields of the choice in the chunk that opens a stream, if there is such a chunk."""
    last_choice: Mapping[str, Any]
    """Fields of the choice in the chunk with the finish reason."""


CHAT = EndpointFormat(
    "chatcmpl",
    "messages",
    "chat.completion",
    "chat.completion.chunk",
    full_choice=lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    chunk_choice=lambda text: {"delta": {"content": text}},
    first_choice={"delta": {"role": "assistant", "content": ""}},
    last_choice={"delta": {}},
)
COMPLETION = EndpointFormat(
    "cmpl",
    "prompt",
    "text_completion",
    "text_completion",
    full_choice=lambda text: {"text": text},
    chunk_choice=lambda text: {"text": text},
    first_choice=None,
    last_choice={"text": ""},
)


class GenerationResponse(Response):
    """A response that runs until the generation has ended or the client has disconnected."""

    def __init__(self, generation: Generation, fields: Mapping[str, Any], form: EndpointFormat) -> None:
        """``fields`` are in every object of the response: ``created``, ``model``, ``system_fingerprint``."""
        super().__init__()
        self._generation = generation
        self._form = form
        self._fields = fields
        self._adapters = [applied.to_json() for applied in generation.adapters.applied]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the response; cancel that if the client disconnects first. The generation is closed in all cases."""
        scope["state"]["generation"] = self._generation  # for the access log
        writing = asyncio.ensure_future(self._write(scope, receive, send))
        disconnected = asyncio.ensure_future(_wait_for_disconnect(receive))
        try:
            await asyncio.wait((writing, disconnected), return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            self._generation.close()
            writing.cancel()
            disconnected.cancel()
            # The client has its response or has left, so further errors cannot be reported to it.
            await asyncio.gather(writing, disconnected, return_exceptions=True)

    async def _write(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError

    def _head(self, kind: str) -> dict[str, Any]:
        """Return the fields that every object of the response begins with."""
        return {"id": self._generation.id, "object": kind, **self._fields, "adapter": self._adapters}

    def _adapter_header(self) -> dict[str, str]:
        """Return the header that names the adapter contents used for the answer, if any."""
        value = ";".join(f"{adapter['name']}={adapter['id']}" for adapter in self._adapters)
        return {"x-manylora-adapter": value} if value else {}

    def _usage(self) -> dict[str, Any]:
        """Return token counts as OpenAI reports them. A stop token counts as part of the completion."""
        generation = self._generation
        return {
            "prompt_tokens": generation.prompt_tokens,
            "completion_tokens": generation.output_tokens,
            "total_tokens": generation.prompt_tokens + generation.output_tokens,
            "prompt_tokens_details": {"cached_tokens": generation.cached_tokens},
        }


class FullResponse(GenerationResponse):
    """One JSON object, sent when the answer is complete."""

    async def _write(self, scope: Scope, receive: Receive, send: Send) -> None:
        text = "".join([piece async for piece in self._generation])
        choice = _choice(self._form.full_choice(text), self._generation.finish)
        body = {**self._head(self._form.full_object), "choices": [choice], "usage": self._usage()}
        await JsonResponse(body, headers=self._adapter_header())(scope, receive, send)


class StreamResponse(GenerationResponse):
    """Server-sent events: a chunk for each step with new text, a chunk with the finish reason, ``[DONE]``."""

    def __init__(
        self, generation: Generation, fields: Mapping[str, Any], form: EndpointFormat, options: StreamOptions
    ) -> None:
        super().__init__(generation, fields, form)
        self._continuous_usage = options.continuous_usage_stats
        self._include_usage = options.include_usage or self._continuous_usage
        self._chunk_head = self._head(form.chunk_object) | ({"usage": None} if self._include_usage else {})
        # Only the text differs between chunks. Dumping each chunk as a whole would take CPU time from the engine.
        self._template = self._chunk(form.chunk_choice(_PLACEHOLDER)).split(json.dumps(_PLACEHOLDER).encode())
        self.headers.update(
            {
                "content-type": "text/event-stream; charset=utf-8",
                "cache-control": "no-cache",
                "x-accel-buffering": "no",  # nginx would buffer the events
                **self._adapter_header(),
            }
        )
        del self.headers["content-length"]

    async def _write(self, scope: Scope, receive: Receive, send: Send) -> None:
        chunk = b"" if self._form.first_choice is None else self._chunk(self._form.first_choice)
        started = False
        try:
            async for text in self._generation:
                if not started:  # not before the first token: a request that fails earlier gets an error status
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    started = True
                if text:
                    chunk += self._text_chunk(text)
                if chunk and not self._generation.finish:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                    chunk = b""
            chunk += self._last_chunks()
        except (EngineError, Draining) as error:
            if not started:
                raise
            chunk = _event(error_body(error)[1])
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    def _text_chunk(self, text: str) -> bytes:
        if self._continuous_usage:
            return self._chunk(self._form.chunk_choice(text))
        return json.dumps(text).encode().join(self._template)

    def _last_chunks(self) -> bytes:
        last = self._chunk(self._form.last_choice, self._generation.finish)
        if self._include_usage:
            last += _event({**self._chunk_head, "choices": [], "usage": self._usage()})
        return last + DONE

    def _chunk(self, choice: Mapping[str, Any], finish: str | None = None) -> bytes:
        usage = {"usage": self._usage()} if self._continuous_usage else {}
        return _event({**self._chunk_head, **usage, "choices": [_choice(choice, finish)]})


def _choice(fields: Mapping[str, Any], finish: str | None) -> dict[str, Any]:
    return {"index": 0, **fields, "logprobs": None, "finish_reason": finish}


def _event(data: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
