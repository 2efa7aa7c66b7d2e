"""Middleware for all requests: request id, access log, metrics by status, and errors."""

import asyncio
import logging
import re
from time import monotonic
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.http.errors import error_object, respond
from server.api.telemetry.request_log import RequestLog
from server.api.telemetry.tracing import Tracing
from server.api.telemetry.work import Work
from server.metrics.metrics import Metrics

log = logging.getLogger(__name__)

CLIENT_DISCONNECTED = 499
"""Status counted for a request whose client disconnected before the response began. nginx uses the same number."""
SHUTDOWN_MESSAGE = "The server shut down before this request was complete."
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class AccessLogMiddleware:
    """Gives each request an id; when it has ended, counts its response, logs one line, and makes its trace if asked."""

    def __init__(self, app: ASGIApp, metrics: Metrics, request_log: RequestLog, tracing: Tracing | None) -> None:
        self._app = app
        self._metrics = metrics
        self._request_log = request_log
        self._tracing = tracing

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
            self._ended(scope, status, monotonic() - started)

    def _ended(self, scope: Scope, status: int, seconds: float) -> None:
        state = scope["state"]
        work: Work | None = state.get("generation")
        adapters = None if work is None else work.adapters.names
        self._metrics.responded(scope["method"], state.get("route"), status, adapters)
        trace_id = None if self._tracing is None else self._tracing.record(scope, status, seconds)
        self._request_log.write(scope, status, seconds, trace_id)


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
