"""Middleware for all requests: request id, access log, metrics by status, errors and the limit on body size."""

import asyncio
import logging
import re
from time import monotonic
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.generation.generation import Generation
from server.api.http.errors import error_object, respond
from server.metrics import Metrics

log = logging.getLogger(__name__)

CLIENT_DISCONNECTED = 499
"""Status counted for a request whose client disconnected before the response began. nginx uses the same number."""
PROBES = frozenset({"/livez", "/readyz", "/health", "/metrics"})
"""Paths that monitoring polls every few seconds. Their requests are logged at debug level only."""
SHUTDOWN_MESSAGE = "The server shut down before this request was complete."
MAX_LOGGED_PATH = 200
"""Maximum number of characters of a path in the log."""
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class AccessLogMiddleware:
    """Gives each request an id, counts its response by status, and logs one line when it has ended."""

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
        status = CLIENT_DISCONNECTED

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
    """Responds with status 500 to unexpected exceptions, and with 503 to requests cancelled by the shutdown."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def track_start(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, track_start)
        except asyncio.CancelledError:
            # At the end of its grace period, uvicorn cancels all requests that still run, such as unfinished uploads.
            if scope["type"] != "http":
                raise
            log.warning("Request %s was cancelled because the server is shutting down", scope["state"]["request_id"])
            if not started:
                body = error_object(503, SHUTDOWN_MESSAGE, code="draining")
                await respond(503, body, path=scope["path"])(scope, receive, send)
        except Exception:
            if scope["type"] != "http":
                raise
            log.exception("Request %s failed", scope["state"]["request_id"])
            if started:
                raise
            body = error_object(500, "Internal server error. The server's log has the details under this request's id.")
            await respond(500, body, path=scope["path"])(scope, receive, send)


def _request_id(scope: Scope) -> str:
    """Return the id from the request's header if it is short printable ASCII, or else a new one."""
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid4().hex


def _log(scope: Scope, status: int, seconds: float) -> None:
    """Log one line about a request, without anything that may be secret: no texts, no headers, no query string.

    The path is logged in its escaped form, so that it cannot contain a line break.
    """
    level = logging.DEBUG if scope["path"].rstrip("/") in PROBES else logging.INFO
    if not log.isEnabledFor(level):
        return
    path = scope["raw_path"].decode("latin-1")[:MAX_LOGGED_PATH]
    parts = [f"{scope['method'][:20]} {path} {status} in {seconds * 1000:.0f} ms"]
    generation: Generation | None = scope["state"].get("generation")
    if generation is not None:
        parts += _describe(generation)
    log.log(level, "%s, id %s", ", ".join(parts), scope["state"]["request_id"])


def _describe(generation: Generation) -> list[str]:
    applied = [f"{each.alias}={each.name}" if each.alias else each.name for each in generation.adapters.applied]
    parts = [f"adapter {' + '.join(applied)}"] if applied else []
    parts.append(f"{generation.prompt_tokens} prompt and {generation.output_tokens} answer tokens")
    if generation.first_token is not None:
        parts.append(f"first after {generation.first_token * 1000:.0f} ms")
    return parts if generation.ended else [*parts, generation.outcome]


class BodyLimitMiddleware:
    """Rejects a body larger than ``limit`` bytes while it is received, whatever length the request declared.

    ``upload_limit`` applies to uploads of adapters instead. Starlette's own limit would answer some of these requests
    in plain text.
    """

    def __init__(self, app: ASGIApp, limit: int, upload_limit: int) -> None:
        self._app = app
        self._limit = limit
        self._upload_limit = upload_limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit = self._upload_limit if _is_upload(scope) else self._limit
        received = 0

        async def limited_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise HTTPException(413)
            return message

        await self._app(scope, limited_receive, send)


def _is_upload(scope: Scope) -> bool:
    """Whether the request uploads an adapter as a form, the only kind of body that is not kept in memory."""
    if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] != "/v1/adapters":
        return False
    kind = Headers(scope=scope).get("content-type", "").partition(";")[0]
    return kind.strip().lower() == "multipart/form-data"
