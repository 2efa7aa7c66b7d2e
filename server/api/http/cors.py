"""CORS: let pages of other origins call this server from the browser, or keep them from it."""

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.http.errors import error_object, respond
from server.api.http.ignored_fields import HEADER
from server.api.http.paths import METHODS

EXPOSED_HEADERS = (
    "x-request-id",
    "x-manylora-adapter",
    HEADER,
    "server-timing",
    "etag",
    "retry-after",
    "x-should-retry",
    *(f"x-ratelimit-{what}-{of}" for of in ("requests", "tokens") for what in ("limit", "remaining", "reset")),
)
"""Response headers that web pages of other origins may read."""


class CrossOriginMiddleware(CORSMiddleware):
    """Starlette's CORS for ``origins``: every method and header, no credentials.

    A page on the internet may call a server in a private network, which browsers ask about in a header of its own:
    the operator has allowed the page's origin. Refused preflights get an error in OpenAI's format.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=METHODS,
            allow_headers=["*"],
            allow_private_network=True,
            expose_headers=EXPOSED_HEADERS,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope.setdefault("state", {})["origin_allowed"] = self.is_allowed_origin(
                Headers(scope=scope).get("origin", "")
            )
        await super().__call__(scope, receive, send)

    def preflight_response(self, request_headers: Headers) -> Response:
        """Return the response to a preflight request."""
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        kept = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
        return respond(400, error_object(400, f"{bytes(response.body).decode()}."), kept)


class CrossSiteMiddleware:
    """Refuses forms that a page of another site sends, unless CORS allows its origin.

    Browsers ask a server before a page sends it JSON, or a DELETE, but not before it sends a form; an upload is one.
    The header that names the site is the browser's, which no page can change. Other clients do not send it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            site = Headers(scope=scope).get("sec-fetch-site")
            if site == "cross-site" and not scope["state"].get("origin_allowed"):
                body = error_object(
                    403, "A page of another site may not do this; see --cors-origin.", code="cross_site"
                )
                await respond(403, body, path=scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)
