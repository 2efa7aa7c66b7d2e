"""AuthenticationMiddleware: which key a request carries, and whether that key may do what the request asks for.

Routes get the key as a parameter of type :data:`KeyDep`.
"""

from collections.abc import Callable
from typing import Annotated, cast

from fastapi import Depends, Request
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from server.access.forbidden import ForbiddenLog
from server.access.key import ANONYMOUS, NOBODY, ApiKey
from server.access.keyring import Keyring
from server.api.access.auditing import actor_of
from server.api.access.scopes import access_of
from server.api.http.errors import error_object, respond

CHALLENGE = {"www-authenticate": 'Bearer realm="manylora"'}
MISSING = (
    "This server asks for an API key, and the request has none. Send `Authorization: Bearer KEY`, or `x-api-key: KEY`."
)
INVALID = "The API key is not valid: it is unknown, expired or revoked."


class AuthenticationMiddleware:
    """Sets ``request.state.key``. Rejects requests without a valid key, and those that their key does not allow.

    A server without any key lets everybody do everything, as :data:`~server.access.key.ANONYMOUS`. This happens before
    the body is read: a request that is rejected costs neither memory nor time.
    """

    def __init__(
        self, app: ASGIApp, keyring: Keyring, forbidden: ForbiddenLog, is_open: Callable[[Scope], bool]
    ) -> None:
        """``is_open``: whether a request needs no key although its path asks for one."""
        self._app = app
        self._keyring = keyring
        self._forbidden = forbidden
        self._is_open = is_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            found = self._authorise(scope)
            if isinstance(found, Response):
                await found(scope, receive, send)
                return
            scope["state"]["key"] = found
        await self._app(scope, receive, send)

    def _authorise(self, scope: Scope) -> ApiKey | Response:
        """Return the key of a request, or the response that rejects it."""
        if not self._keyring.required:
            return ANONYMOUS
        path, access = scope["path"], access_of(scope["method"], scope["path"])
        if access == "open" or self._is_open(scope):
            return NOBODY
        secret = secret_of(Headers(scope=scope))
        key = None if secret is None else self._keyring.find(secret)
        if key is None:
            message = MISSING if secret is None else INVALID
            return respond(401, error_object(401, message, code="invalid_api_key"), CHALLENGE, path=path)
        if access != "any" and not key.may(access):
            self._forbidden.note(actor_of(scope, key), scope["method"], path)
            message = f"This API key lacks the scope `{access}`."
            return respond(403, error_object(403, message, code="insufficient_permissions"), path=path)
        return key


def secret_of(headers: Headers) -> str | None:
    """Return the secret that a request carries: as OpenAI's clients send it, or as Anthropic's do."""
    scheme, _, secret = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and secret.strip():
        return secret.strip()
    return headers.get("x-api-key", "").strip() or None


async def _key(request: Request) -> ApiKey:
    return cast("ApiKey", request.state.key)


KeyDep = Annotated[ApiKey, Depends(_key)]
"""Declare a route parameter with this type to get the key of the request."""
