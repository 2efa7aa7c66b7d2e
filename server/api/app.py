"""The ASGI application around a service."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from uuid import uuid4

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api import adapters, completions, health, models
from server.api.errors import Json, envelope, install
from server.api.service import Service
from server.metrics import Metrics

log = logging.getLogger(__name__)

CLIENT_LEFT = 499
"""Counted for a request whose client was gone before an answer began; nginx's number."""
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


def create_app(service: Service) -> FastAPI:
    """The application. Its lifespan runs the engine."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.switchboard.bind()
        service.engine.start()
        try:
            yield
        finally:
            service.switchboard.draining = True
            await asyncio.to_thread(service.engine.stop)
            service.lock.release()

    app = FastAPI(
        title="manylora",
        version=version("manylora"),
        lifespan=lifespan,
        redirect_slashes=False,
        max_body_size=int(service.settings.max_body_mib * 2**20),
    )
    app.state.service = service
    for routes in (completions, models, adapters, health):
        app.include_router(routes.router)
    install(app)
    app.add_middleware(Door, metrics=service.metrics)
    return app


class Door:
    """What every request passes: an id for it, a count by status, and an answer where something unforeseen happens."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            log.exception("Request %s failed", request_id)
            if status is not None:
                raise
            body = envelope(500, "Something went wrong on the server; it is in its log.")
            await Json(body, 500)(scope, receive, send_with_id)
        finally:
            self._metrics.responded(CLIENT_LEFT if status is None else status)


def _request_id(scope: Scope) -> str:
    """The caller's own, if it gave one that is fit for a log."""
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid4().hex
