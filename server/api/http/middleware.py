"""What every request passes before any route: an id, a count by status and a line in the log, a bound on its body."""

import asyncio
import logging
import re
from time import monotonic
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.generation.generation import Generation
from server.api.http.errors import JsonResponse, envelope
from server.metrics import Metrics

log = logging.getLogger(__name__)

CLIENT_LEFT = 499
"""Counted for a request whose client was gone before an answer began; nginx's number."""
PROBES = frozenset({"/livez", "/readyz", "/health", "/metrics"})
"""Asked every few seconds by machines: logged at debug only."""
CUT_OFF = "The server has shut down before it had this request as a whole, or was done with it."
LONGEST_LOGGED = 200
"""Characters of a path that are logged."""
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class AccessLogMiddleware:
    """Gives each request an id, counts its answer, and logs a line of it when it is over."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = monotonic()
        state = scope.setdefault("state", {})
        state["request_id"] = _request_id(scope)
        status = CLIENT_LEFT

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = state["request_id"]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            self._metrics.responded(status)
            _log(scope, status, monotonic() - started)


class ErrorMiddleware:
    """Answers where something happens that no route expects, and where the server ends before a request is complete."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def noting_send(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, noting_send)
        except asyncio.CancelledError:
            # uvicorn does this to what is left when its time to close is over: bodies that still come in, for one.
            if scope["type"] != "http":
                raise
            log.warning("Request %s was given up at the end", scope["state"]["request_id"])
            if not begun:
                await JsonResponse(envelope(503, CUT_OFF, code="draining"), 503)(scope, receive, send)
        except Exception:
            if scope["type"] != "http":
                raise
            log.exception("Request %s failed", scope["state"]["request_id"])
            if begun:
                raise
            body = envelope(500, "Something went wrong on the server; it is in its log.")
            await JsonResponse(body, 500)(scope, receive, send)


def _request_id(scope: Scope) -> str:
    """The caller's own, if it gave one that is fit for a log."""
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid4().hex


def _log(scope: Scope, status: int, seconds: float) -> None:
    """One line, without anything that may be secret: neither texts nor headers nor the query.

    The path is told as it came, escaped, so that it cannot forge another line.
    """
    level = logging.DEBUG if scope["path"].rstrip("/") in PROBES else logging.INFO
    if not log.isEnabledFor(level):
        return
    path = scope["raw_path"].decode("latin-1")[:LONGEST_LOGGED]
    parts = [f"{scope['method'][:20]} {path} {status} in {seconds * 1000:.0f} ms"]
    generation: Generation | None = scope["state"].get("generation")
    if generation is not None:
        parts += _parts(generation)
    log.log(level, "%s, id %s", ", ".join(parts), scope["state"]["request_id"])


def _parts(generation: Generation) -> list[str]:
    applied = [f"{each.alias}={each.name}" if each.alias else each.name for each in generation.adapters.applied]
    parts = [f"adapter {' + '.join(applied)}"] if applied else []
    parts.append(f"{generation.prompt_tokens} prompt and {generation.output_tokens} answer tokens")
    if generation.first_token is not None:
        parts.append(f"first after {generation.first_token * 1000:.0f} ms")
    return parts if generation.finish else [*parts, generation.outcome]


class BodyLimitMiddleware:
    """Refuses a body of more than ``limit`` bytes while it comes in, whatever length was declared.

    An upload of an adapter may have ``upload_limit``. Starlette's own answers some of them in plain text.
    """

    def __init__(self, app: ASGIApp, limit: int, upload_limit: int) -> None:
        self._app = app
        self._limit = limit
        self._upload_limit = upload_limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit = self._upload_limit if _is_upload(scope) else self._limit
        received = 0

        async def receive_within() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise HTTPException(413)
            return message

        await self._app(scope, receive_within, send)


def _is_upload(scope: Scope) -> bool:
    """Whether a form is sent to where adapters are registered: a body that no route keeps in memory."""
    if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] != "/v1/adapters":
        return False
    kind = Headers(scope=scope).get("content-type", "").partition(";")[0]
    return kind.strip().lower() == "multipart/form-data"
