"""Write the answer to a generation to the client: as one JSON object, or as a stream of server-sent events."""

import asyncio
from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import suppress
from time import monotonic

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.formats.answer import spans_of
from server.api.formats.format import AnswerFormat
from server.api.generation.generation import Generation
from server.api.generation.pieces import Piece, join
from server.api.http.disconnect import until_disconnect
from server.api.http.errors import JsonResponse
from server.errors import EngineError, RequestError

MAX_BEHIND = 1 << 16
"""Tokens, and log probabilities in their places, that may wait for a client to read before its stream is aborted.

About 10 MB. The server also aborts what a client has not read for ``--write-timeout-seconds``.
"""


class GenerationResponse(Response):
    """A response that runs until the generation has ended or the client has disconnected."""

    def __init__(self, form: AnswerFormat) -> None:
        super().__init__()
        self._form = form
        self._generation = form.generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the response; cancel that if the client disconnects first. The generation is closed in all cases."""
        scope["state"]["generation"] = self._generation  # for the access log
        try:
            with suppress(ClientDisconnect):
                await until_disconnect(receive, self._write(scope, receive, send))
        finally:
            self._generation.close()

    async def _write(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError

    def _timing_header(self) -> dict[str, str]:
        """Return the header that says where the time went, which browsers show."""
        timing = self._generation.timing
        spans = {} if timing is None else spans_of(timing)
        value = ", ".join(f"{name};dur={milliseconds}" for name, milliseconds in spans.items())
        return {"server-timing": value} if value else {}


class FullResponse(GenerationResponse):
    """One JSON object, sent when the answer is complete."""

    async def _write(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = self._form.body(await _collect(self._generation))
        headers = self._generation.adapters.header() | self._timing_header()
        await JsonResponse(body, headers=headers)(scope, receive, send)


class StreamResponse(GenerationResponse):
    """Server-sent events, as the format writes them.

    The head is sent with the first token, so that a request that fails before it gets an error status; but after
    ``silence`` seconds it is sent with a comment, lest a proxy or the client gives up.
    """

    def __init__(self, form: AnswerFormat, silence: float) -> None:
        super().__init__(form)
        self._silence = silence
        self.headers.update(
            {
                "content-type": "text/event-stream; charset=utf-8",
                "cache-control": "no-cache",
                "x-accel-buffering": "no",  # nginx would buffer the events
                **self._generation.adapters.header(),
            }
        )
        del self.headers["content-length"]
        self._started = False

    async def _write(self, scope: Scope, receive: Receive, send: Send) -> None:
        chunk = self._form.begin()
        silence = _Silence(self._generation, self._silence, scope["state"]["abort"])
        try:
            async for pieces in self._generation:
                if not pieces:
                    await self._send(send, self._form.waiting())
                    continue
                for index, piece in pieces:
                    chunk += self._form.push(index, piece)
                if not self._generation.ended:
                    await self._send(send, chunk)
                    chunk = b""
            chunk += self._form.end()
        except (EngineError, RequestError) as error:
            if not self._started:
                raise
            chunk = self._form.error(error)
        finally:
            silence.end()
        await self._send(send, chunk)
        await send({"type": "http.response.body", "body": b""})

    async def _send(self, send: Send, chunk: bytes) -> None:
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        if chunk:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})


class _Silence:
    """Wakes a generation when it has had no tokens for some seconds, and aborts it when its client reads too slowly.

    One timer for the whole stream: a timeout for each wait would cost more than the rest of the loop.
    """

    def __init__(self, generation: Generation, seconds: float, abort: Callable[[], None]) -> None:
        self._generation = generation
        self._seconds = seconds
        self._abort = abort
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(seconds, self._check)

    def end(self) -> None:
        """Wake it no more."""
        self._timer.cancel()

    def _check(self) -> None:
        if self._generation.behind > MAX_BEHIND:
            self._abort()
        left = self._generation.last_token + self._seconds - monotonic()
        if left <= 0:
            self._generation.wake()
        self._timer = self._loop.call_later(left if left > 0 else self._seconds, self._check)


async def _collect(generation: Generation) -> Seq[Piece]:
    """Return the whole answer of each choice."""
    parts: list[list[Piece]] = [[] for _ in generation.choices]
    async for pieces in generation:
        for index, piece in pieces:
            parts[index].append(piece)
    return [join(part) for part in parts]
