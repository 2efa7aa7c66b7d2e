"""BodyLimitMiddleware: bodies that are too large, too slow, or too many at once."""

import asyncio
from collections.abc import Mapping
from time import monotonic

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

BYTES_A_SECOND = 16 << 10
"""Each second is added to a body's time when so many of its bytes have come, so that large ones may take longer."""
MAX_INCOMPLETE = 256 << 20
"""Bytes of all incomplete bodies together that are kept in memory."""


class BodyRefused(HTTPException):
    """A body that is not received for a reason that has a code."""

    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(status, message, {"connection": "close"})
        self.code = code


class BodyLimitMiddleware:
    """Limits bodies while they are received, whatever length the request declared.

    A body larger than ``limit`` bytes gets 413, and one that takes longer than ``seconds`` and its size allow 408. A
    body that does not fit into :data:`MAX_INCOMPLETE`, or four times ``limit``, beside those that are being received
    gets 503. Of forms with files, only the size is limited here, by ``upload_limits``: they are written to disk, and
    have timeouts of their own. Starlette's own limit would answer some of these requests in plain text.
    """

    def __init__(self, app: ASGIApp, limit: int, upload_limits: Mapping[str, int], seconds: float) -> None:
        """``upload_limits``: path -> largest form that may be sent there by POST."""
        self._app = app
        self._limit = limit
        self._upload_limits = upload_limits
        self._seconds = seconds
        self._most = max(MAX_INCOMPLETE, 4 * limit)
        self._incomplete = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["path"] in self._upload_limits and _is_upload(scope):
            await self._app(scope, _limited(receive, self._upload_limits[scope["path"]]), send)
        else:
            body = _Body(receive, self._seconds)
            try:
                await self._app(scope, _limited(lambda: self._receive(body), self._limit), send)
            finally:
                self._forget(body)

    async def _receive(self, body: "_Body") -> Message:
        message = await body.receive()
        if not body.complete:
            new = len(message.get("body", b""))
            if self._incomplete + new > self._most:
                raise BodyRefused(503, "Too many large bodies arrive at once.", "too_many_bodies")
            body.counted += new
            self._incomplete += new
        else:
            self._forget(body)
        return message

    def _forget(self, body: "_Body") -> None:
        self._incomplete -= body.counted
        body.counted = 0


class _Body:
    """A body that is being received."""

    def __init__(self, receive: Receive, seconds: float) -> None:
        self.complete = False
        """Whether nothing follows but the end of the connection."""
        self.counted = 0
        """Bytes of it that count as incomplete."""
        self._receive = receive
        self._deadline = monotonic() + seconds

    async def receive(self) -> Message:
        """Return the next message. Raises HTTPException 408 if the body takes too long."""
        if self.complete:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError as error:
            raise HTTPException(408, "The body did not arrive in time.", {"connection": "close"}) from error
        self._deadline += len(message.get("body", b"")) / BYTES_A_SECOND
        self.complete = not message.get("more_body", False)
        return message


def _limited(receive: Receive, limit: int) -> Receive:
    received = 0

    async def limited_receive() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise HTTPException(413, f"The request body is too large: it has more than {limit} bytes.")
        return message

    return limited_receive


def _is_upload(scope: Scope) -> bool:
    """Whether the request uploads files in a form, the only kind of body that is not kept in memory."""
    if scope["method"] != "POST":
        return False
    kind = Headers(scope=scope).get("content-type", "").partition(";")[0]
    return kind.strip().lower() == "multipart/form-data"
