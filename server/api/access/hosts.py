"""HostMiddleware: keeps web pages from reaching a server without keys by a name of their own (DNS rebinding).

A page may make its own host name point at 127.0.0.1. To the visitor's browser this server is then the page's own, so
neither CORS nor ``Sec-Fetch-Site`` keeps the page from it; but the name is in ``Host``, which no page can change.
"""

from collections.abc import Collection
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.access.keyring import Keyring
from server.api.http.errors import error_object, respond

ANY = "*"


class HostMiddleware:
    """Rejects requests whose ``Host`` is a name other than ``localhost`` and ``names``, while there are no keys.

    An address is no name that somebody else could point here. With keys, a page has none to send. Requests without a
    ``Host`` do not come from a browser.
    """

    def __init__(self, app: ASGIApp, keyring: Keyring, names: Collection[str]) -> None:
        self._app = app
        self._keyring = keyring
        self._names = {"localhost", *names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._keyring.required:
            host = host_of(Headers(scope=scope))
            if not self._is_allowed(host):
                message = (
                    f"This server has no API keys, so it answers to addresses, `localhost` and the names of "
                    f"--allowed-host only, and this request is for the host `{host:.100}`."
                )
                response = respond(403, error_object(403, message, code="host_not_allowed"), path=scope["path"])
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_allowed(self, host: str) -> bool:
        return not host or host in self._names or ANY in self._names or _is_address(host)


def host_of(headers: Headers) -> str:
    """Return the name or address in ``Host``, without its port, in lower case; empty if there is none."""
    host = headers.get("host", "").lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].rstrip(".")


def _is_address(host: str) -> bool:
    try:
        ip_address(host.replace("%25", "%"))
    except ValueError:
        return False
    return True
