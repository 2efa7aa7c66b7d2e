"""CORS: let pages of other origins call this server from the browser."""

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

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

    def preflight_response(self, request_headers: Headers) -> Response:
        """Return the response to a preflight request."""
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        kept = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
        return respond(400, error_object(400, f"{bytes(response.body).decode()}."), kept)
