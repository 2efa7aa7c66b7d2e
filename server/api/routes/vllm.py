"""``/v1/load_lora_adapter`` and ``/v1/unload_lora_adapter``, compatible with vLLM."""

from http import HTTPStatus
from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.responses import PlainTextResponse, Response

from adapters.errors import AdapterError, RevisionMismatch, UnknownAdapter
from adapters.registry.registration import RegistrationOptions
from server.access.view import RegistryView
from server.api.access.authentication import KeyDep
from server.api.http.errors import InvalidAdapter, JsonResponse, respond, status_of
from server.api.http.json_body import JsonRoute
from server.api.http.openapi import error_statuses
from server.api.registry.registration import register_path
from server.api.schemas.registry import LoadRequest, UnloadRequest
from server.api.schemas.responses import VllmErrorAnswer
from server.api.service import ServiceDep
from server.errors import ServerError

router = APIRouter(prefix="/v1", tags=["vLLM"], route_class=JsonRoute)

TYPES = {
    400: "BadRequestError",
    404: "NotFoundError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}
"""Status -> vLLM's name for it, where it differs from HTTP's phrase."""


@router.post(
    "/load_lora_adapter",
    response_class=PlainTextResponse,
    responses=error_statuses(400, 409, 413, 429, 500, 503, 507, model=VllmErrorAnswer),
)
async def load_lora_adapter(request: LoadRequest, service: ServiceDep, key: KeyDep) -> Response:
    """Register a folder under `--adapter-root`. As in vLLM, the adapter is on the device before the response."""
    name = request.lora_name
    if not name or not request.lora_path:
        return _invalid("Both 'lora_name' and 'lora_path' must be provided.")
    if name == service.base.name:
        return _invalid(f"The lora adapter '{name}' conflicts with a served base model.")
    expected = None if request.load_inplace else 0
    try:
        if expected == 0 and _exists(service.view(key), name):
            raise RevisionMismatch(name)
        service.event_router.check_open()
        await register_path(service, key, name, request.lora_path, RegistrationOptions(preload=True, expected=expected))
    except RevisionMismatch:
        return _invalid(
            f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, "
            "set 'load_inplace' to True."
        )
    except (AdapterError, ServerError) as error:
        # vLLM does not use status 422.
        return _error(str(error), 400 if isinstance(error, InvalidAdapter) else status_of(error))
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@router.post(
    "/unload_lora_adapter",
    response_class=PlainTextResponse,
    responses=error_statuses(400, 404, 409, 413, 500, 503, model=VllmErrorAnswer),
)
async def unload_lora_adapter(request: UnloadRequest, service: ServiceDep, key: KeyDep) -> Response:
    """Remove an adapter and all its versions."""
    name = request.lora_name
    if not name:
        return _invalid("'lora_name' needs to be provided to unload a LoRA adapter.")
    view = service.view(key)
    if not _exists(view, name):
        return _error(f"The lora adapter '{name}' cannot be found.", 404)
    try:
        await run_in_threadpool(view.remove, name)
    except AdapterError as error:
        return _error(str(error), status_of(error))
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


def _exists(view: RegistryView, name: str) -> bool:
    """Whether there is an adapter of this name; versions and aliases do not count."""
    try:
        view.entry(name)
    except UnknownAdapter:
        return False
    return True


def _invalid(message: str) -> JsonResponse:
    return _error(message, 400, "InvalidUserInput")


def _error(message: str, status: int, kind: str | None = None) -> JsonResponse:
    """Return an error in vLLM's format, whose code is the HTTP status."""
    error: dict[str, Any] = {
        "message": message,
        "type": kind or TYPES.get(status, HTTPStatus(status).phrase),
        "param": None,
        "code": status,
    }
    return respond(status, {"error": error})
