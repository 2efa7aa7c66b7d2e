"""``/v1/load_lora_adapter`` and ``/v1/unload_lora_adapter``: what vLLM's operators send, answered as vLLM does."""

from http import HTTPStatus
from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.responses import PlainTextResponse, Response

from adapters.errors import AdapterError, RevisionMismatch, UnknownAdapter
from adapters.registry.registration import RegistrationOptions
from server.api.http.document import refusals
from server.api.http.errors import Json, Refusal, respond, status_of
from server.api.registry.registration import register_path
from server.api.schemas.answers import VllmErrorAnswer
from server.api.schemas.registry import LoadRequest, UnloadRequest
from server.api.service import Served, Service
from server.errors import ServerError

router = APIRouter(prefix="/v1", tags=["vLLM"])

TYPES = {
    400: "BadRequestError",
    404: "NotFoundError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}
"""Status -> what vLLM calls it, where that is not HTTP's phrase."""


@router.post(
    "/load_lora_adapter",
    response_class=PlainTextResponse,
    responses=refusals(400, 409, 413, 429, 500, 503, 507, model=VllmErrorAnswer),
)
async def load_lora_adapter(request: LoadRequest, service: Served) -> Response:
    """Register a folder under ``adapter_root``; it is on the device when this is answered, as with vLLM."""
    name = request.lora_name
    if not name or not request.lora_path:
        return _wrong("Both 'lora_name' and 'lora_path' must be provided.")
    if name == service.base.name:
        return _wrong(f"The lora adapter '{name}' conflicts with a served base model.")
    expected = None if request.load_inplace else 0
    try:
        if expected == 0 and _exists(service, name):
            raise RevisionMismatch(name)
        service.event_router.check_open()
        await register_path(service, name, request.lora_path, RegistrationOptions(preload=True, expected=expected))
    except RevisionMismatch:
        return _wrong(
            f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, "
            "set 'load_inplace' to True."
        )
    except (AdapterError, ServerError) as error:
        # vLLM knows no 422.
        return _error(str(error), 400 if isinstance(error, Refusal) else status_of(error))
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@router.post(
    "/unload_lora_adapter",
    response_class=PlainTextResponse,
    responses=refusals(400, 404, 409, 413, 500, 503, model=VllmErrorAnswer),
)
async def unload_lora_adapter(request: UnloadRequest, service: Served) -> Response:
    """Forget an adapter and all its versions."""
    name = request.lora_name
    if not name:
        return _wrong("'lora_name' needs to be provided to unload a LoRA adapter.")
    if not _exists(service, name):
        return _error(f"The lora adapter '{name}' cannot be found.", 404)
    try:
        await run_in_threadpool(service.registry.remove, name)
    except AdapterError as error:
        return _error(str(error), status_of(error))
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


def _exists(service: Service, name: str) -> bool:
    """Whether an adapter, not a version or an alias, has the name."""
    try:
        service.registry.entry(name)
    except UnknownAdapter:
        return False
    return True


def _wrong(message: str) -> Json:
    return _error(message, 400, "InvalidUserInput")


def _error(message: str, status: int, kind: str | None = None) -> Json:
    """The error object of vLLM; its code is the status, a number."""
    error: dict[str, Any] = {
        "message": message,
        "type": kind or TYPES.get(status, HTTPStatus(status).phrase),
        "param": None,
        "code": status,
    }
    return respond(status, {"error": error})
