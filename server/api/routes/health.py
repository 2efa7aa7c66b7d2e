"""Liveness, readiness, version and metrics."""

from importlib.metadata import version

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from server.api.access.authentication import KeyDep
from server.api.http.errors import JsonResponse
from server.api.http.openapi import returns
from server.api.schemas.responses import ServerVersion, Status
from server.api.service import ServiceDep

router = APIRouter(tags=["server"])


@router.get("/livez", responses=returns(Status, 200, 503))
async def livez(service: ServiceDep) -> JsonResponse:
    """Liveness probe. 503 if the server needs a restart: the engine has stopped, or keeps failing.

    A step that does not end leaves it at 200: it may only be slow, and a restart would lose its requests. If it is
    not, the server ends itself after ``--step-timeout``, with its stacks in the log, which a kill would not leave.
    """
    return _status("alive") if service.engine.stats().healthy else _status("engine failing", 503)


@router.get("/health", responses=returns(Status, 200, 503))
@router.get("/readyz", responses=returns(Status, 200, 503))
async def readyz(service: ServiceDep) -> JsonResponse:
    """Readiness probe. 503 while the server should receive no requests.

    It is draining or failing, or a step has not ended for about 10 s.
    """
    if service.leaving.is_set():
        return _status("draining", 503)
    if service.watchdog.stuck:
        return _status("engine stuck", 503)
    return _status("ready") if service.engine.stats().healthy else _status("engine failing", 503)


@router.get("/version", responses=returns(ServerVersion))
async def server_version(service: ServiceDep) -> JsonResponse:
    """Return the server's version, and the fingerprint of the base that adapters must have been trained on."""
    return JsonResponse({"version": version("manylora"), "base_fingerprint": service.base.layout.fingerprint})


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request, service: ServiceDep, key: KeyDep) -> Response:
    """Return metrics in Prometheus' text format, or in OpenMetrics if `Accept` asks for that.

    Those that name an adapter which the key does not see are left out.
    """
    sees = None if key.adapters is None else key.sees
    page, content_type = service.metrics.render(request.headers.get("accept", ""), sees)
    return Response(page, media_type=content_type)


def _status(status: str, code: int = 200) -> JsonResponse:
    return JsonResponse({"status": status}, code)
