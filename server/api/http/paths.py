"""PathMiddleware: one spelling of each, and which methods may be asked of it."""

import re
from urllib.parse import unquote

from fastapi import FastAPI
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

METHODS = ("GET", "PUT", "POST", "PATCH", "DELETE")
"""Those that routes are declared with. HEAD goes where GET goes, OPTIONS everywhere."""
_ORIGIN = re.compile(r"https?://[^/]*(?:/|\Z)", re.IGNORECASE)
"""What a URL has before its path. A path itself begins with a slash."""


class PathMiddleware:
    """Takes a path with doubled or trailing slashes for the one without, HEAD for GET, and answers OPTIONS.

    A request that names the whole URL, as one to a proxy does, means its path (RFC 9112, 3.2.2). Nothing is
    redirected: clients that follow leave out the body. An escaped slash (``%2F``) is part of a name, and ``..`` is
    nothing but a name that no adapter has.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Copies: uvicorn looks into its own, to send no body after a HEAD.
        scope = {**scope, **_plain(scope["raw_path"])}
        if scope["method"] == "OPTIONS" and (methods := allowed_methods(scope)):
            await Response(status_code=204, headers={"allow": ", ".join(methods)})(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            scope["method"] = "GET"
        await self._app(scope, receive, send)


def allowed_methods(scope: Scope) -> list[str]:
    """The methods that the path of ``scope`` has on whichever of its routes; none where there is no such path."""
    app: FastAPI = scope["app"]
    asked = {name: scope[name] for name in ("type", "path", "headers")}
    methods = [method for method in METHODS if _has(app, {**asked, "method": method})]
    return methods and [*methods, *(["HEAD"] if "GET" in methods else []), "OPTIONS"]


def _has(app: FastAPI, scope: Scope) -> bool:
    return any(route.matches(scope)[0] is Match.FULL for route in app.router.routes)


def _plain(raw_path: bytes) -> Scope:
    """Both forms of a path, without the slashes that mean nothing."""
    told = raw_path.decode("latin-1")
    if origin := _ORIGIN.match(told):
        told = told[origin.end() :]
    raw = "/" + "/".join(part for part in told.split("/") if part)
    path = unquote(raw)
    # Starlette's routes overlook a line break at the end: "red%0A" would be "red". Left escaped, it is no name.
    return {"path": raw if "\n" in path else path, "raw_path": raw.encode("latin-1")}
