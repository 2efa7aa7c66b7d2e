"""Liveness, readiness, version and metrics."""

from importlib.metadata import version

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import PlainTextResponse, Response

from server.api.http.errors import JsonResponse
from server.api.http.openapi import returns
from server.api.schemas.responses import ServerVersion, Status
from server.api.service import ServiceDep

router = APIRouter(tags=["server"])


@router.get("/livez", responses=returns(Status, 200, 503))
async def livez(service: ServiceDep) -> JsonResponse:
    """Liveness probe. 503 if the server needs a restart: the engine has stopped, or keeps failing."""
    return _status("alive") if service.engine.stats().healthy else _status("engine failing", 503)


@router.get("/health", responses=returns(Status, 200, 503))
@router.get("/readyz", responses=returns(Status, 200, 503))
async def readyz(service: ServiceDep) -> JsonResponse:
    """Readiness probe. 503 while the server should receive no requests: it is draining or failing."""
    if service.event_router.draining:
        return _status("draining", 503)
    return _status("ready") if service.engine.stats().healthy else _status("engine failing", 503)


@router.get("/version", responses=returns(ServerVersion))
async def server_version(service: ServiceDep) -> JsonResponse:
    """Return the server's version, and the fingerprint of the base that adapters must have been trained on."""
    return JsonResponse({"version": version("manylora"), "base_fingerprint": service.base.layout.fingerprint})


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(service: ServiceDep) -> Response:
    """Return metrics in Prometheus' text format."""
    return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)


def _status(status: str, code: int = 200) -> JsonResponse:
    return JsonResponse({"status": status}, code)
