"""``--lenient``: ignore unknown fields of requests, and name them in a header of the response."""

from collections.abc import Iterable
from urllib.parse import quote

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.schemas.base import IGNORED

HEADER = "x-manylora-ignored"
"""Header with the names of the ignored fields, separated by commas."""
MAX_NAMED = 20
MAX_NAME_LENGTH = 80
"""Maximum number of fields in the header, and of characters of each."""


class IgnoredFieldsMiddleware:
    """Lets requests have unknown fields, and lists them in :data:`HEADER` of their responses."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        ignored: list[str] = []

        async def send_with_header(message: Message) -> None:
            if message["type"] == "http.response.start" and ignored:
                MutableHeaders(scope=message)[HEADER] = header_value(ignored)
            await send(message)

        token = IGNORED.set(ignored)
        try:
            await self._app(scope, receive, send_with_header)
        finally:
            IGNORED.reset(token)


def header_value(fields: Iterable[str]) -> str:
    """Return field names as a header's value, each once. Whatever is not a letter, a digit or ``_.-~`` is escaped."""
    names = [quote(field[:MAX_NAME_LENGTH], safe="") for field in dict.fromkeys(fields)]
    return ", ".join([*names[:MAX_NAMED], *(["..."] if len(names) > MAX_NAMED else [])])
