"""``GET /``: basic facts about the server, and links."""

from importlib.metadata import version

from fastapi import APIRouter

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


@router.get("/", responses=returns(Index))
async def index(service: ServiceDep) -> JsonResponse:
    """Return the server's name, version and base, and links."""
    return JsonResponse(
        {"name": "manylora", "version": version("manylora"), "model": service.base.name, "links": LINKS}
    )
