"""Normalise request paths, and answer HEAD and OPTIONS."""

import re
from urllib.parse import unquote

from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

METHODS = ("GET", "PUT", "POST", "PATCH", "DELETE")
"""Methods of the routes. HEAD works where GET does, OPTIONS everywhere."""
_ORIGIN = re.compile(r"https?://[^/]*(?:/|\Z)", re.IGNORECASE)
"""The part of an absolute URL before its path."""


class PathMiddleware:
    """Removes doubled and trailing slashes from paths, serves HEAD as GET, and answers OPTIONS.

    An absolute URL in the request line, as sent to proxies, stands for its path (RFC 9112, 3.2.2). Paths are never
    redirected, because clients drop the body when they follow a redirect. An escaped slash (``%2F``) is part of a name.
    ``..`` has no special meaning: it is a name that no adapter can have.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Change a copy: uvicorn needs the original method to omit the body after a HEAD.
        scope = {**scope, **_plain(scope["raw_path"])}
        if scope["method"] == "OPTIONS" and (methods := allowed_methods(scope)):
            await Response(status_code=204, headers={"allow": ", ".join(methods)})(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            scope["method"] = "GET"
        try:
            await self._app(scope, receive, send)
        finally:
            # For metrics, logs and traces, which know the scope as it was before the copy.
            scope["state"]["route"] = getattr(scope.get("route"), "path_format", None)


def allowed_methods(scope: Scope) -> list[str]:
    """Return the methods that any route has for the path of ``scope``; empty if there is no such path."""
    app: FastAPI = scope["app"]
    asked = {name: scope[name] for name in ("type", "path", "headers")}
    methods = [method for method in METHODS if _has(app, {**asked, "method": method})]
    return methods and [*methods, *(["HEAD"] if "GET" in methods else []), "OPTIONS"]


def plain_paths(app: FastAPI, method: str) -> list[str]:
    """Return the paths without parameters that have a route for ``method``, in order."""
    routes = list(iter_route_contexts(app.routes))
    paths = {route.path for route in routes if route.path is not None and method in (route.methods or ())}
    return sorted(path for path in paths if "{" not in path)


def _has(app: FastAPI, scope: Scope) -> bool:
    return any(route.matches(scope)[0] is Match.FULL for route in app.router.routes)


def _plain(raw_path: bytes) -> Scope:
    """Return the unescaped and the escaped path without redundant slashes."""
    text = raw_path.decode("latin-1")
    if origin := _ORIGIN.match(text):
        text = text[origin.end() :]
    raw = "/" + "/".join(part for part in text.split("/") if part)
    path = unquote(raw)
    # Starlette's routes ignore a trailing line break: "red%0A" would match "red". Escaped, it matches no name.
    return {"path": raw if "\n" in path else path, "raw_path": raw.encode("latin-1")}
