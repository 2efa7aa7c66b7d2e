"""What every request passes before any route: an id, a count by status, a bound on its body."""

import logging
import re
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import Json, envelope
from server.metrics import Metrics

log = logging.getLogger(__name__)

CLIENT_LEFT = 499
"""Counted for a request whose client was gone before an answer began; nginx's number."""
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Door:
    """Gives each request an id, counts its answer, and answers where something unforeseen happens."""

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


class BodyLimit:
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
