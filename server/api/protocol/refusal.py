"""RefusalMiddleware: answer the requests of connections above the limits."""

from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.http.errors import error_object, respond
from server.api.telemetry.request_log import PROBES


class RefusalMiddleware:
    """Responds with 503 on connections above the limits, but to probes, so that nobody takes the server for dead."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = scope["state"].get("refusal") if scope["type"] == "http" else None
        if refusal is None or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        body = error_object(503, refusal, code="too_many_connections")
        await respond(503, body, {"connection": "close"}, path=scope["path"])(scope, receive, send)
