"""``GET /``: the web page for browsers, basic facts about the server for others; and the page's files."""

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from server.api.http.errors import JsonResponse
from server.api.http.openapi import returns
from server.api.schemas.responses import Index
from server.api.service import ServiceDep

router = APIRouter(tags=["server"])

LINKS = {
    "documentation": "/docs",
    "openapi": "/openapi.json",
    "models": "/v1/models",
    "adapters": "/v1/adapters",
    "health": "/health",
    "metrics": "/metrics",
}
"""Link name -> path."""
_HTML = {"text/html": {"schema": {"type": "string"}}}


def _answers() -> dict[int | str, dict[str, Any]]:
    found = returns(Index)
    found[200]["content"] |= _HTML
    return {**found, 503: {"description": "The web page is not built.", "content": _HTML, "headers": {}}}


@router.get("/", responses=_answers())
async def index(request: Request, service: ServiceDep) -> Response:
    """Return the web page if `Accept` prefers HTML, else the server's name, version and base, and links.

    The page needs no key: it asks for one.
    """
    page = request.app.state.page
    if page is not None and page.wanted(request.scope):
        document: Response = page.document(request.headers)
        return document
    facts = {"name": "manylora", "version": version("manylora"), "model": service.base.name, "links": LINKS}
    return JsonResponse(facts, headers={"vary": "Accept"})


@router.get("/assets/{path:path}", include_in_schema=False)
async def page_file(request: Request, path: str) -> Response:
    """Return a file of the web page."""
    page = request.app.state.page
    if page is None:
        raise HTTPException(404)
    file: Response = page.asset(path, request.headers)
    return file
