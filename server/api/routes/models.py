"""``GET /v1/models``: the base and every name that stands for an adapter, as OpenAI lists models."""

from fastapi import APIRouter
from starlette.responses import Response

from adapters.errors import UnknownAdapter
from adapters.registry.names import parse_reference
from adapters.registry.snapshot import Alias, Version
from server.api.http.errors import JsonResponse
from server.api.http.openapi import error_statuses, returns
from server.api.http.pagination import After, JsonObject, Limit, list_response
from server.api.schemas.responses import Model, Models
from server.api.service import Service, ServiceDep
from server.errors import InvalidRequest, UnknownModel

router = APIRouter(prefix="/v1", tags=["models"])


@router.get("/models", responses=returns(Models) | error_statuses(400))
async def list_models(service: ServiceDep, after: After = None, limit: Limit = None) -> Response:
    """The base, then adapters with their versions, and aliases, in the order of their names, asleep or not."""
    base = service.base.name
    start = _start(after, base)

    def cards(after: str | None, count: int) -> list[JsonObject]:
        first = [base_object(service)] if after is None else []
        names = service.registry.names(after or "", count - len(first))
        return first + [item(service, name, meant) for name, meant in names]

    return list_response(cards, start, limit)


def _start(after: str | None, base: str) -> str | None:
    """After which of the registry's names a page starts; ``""`` is before all of them, None before the base too."""
    if not after or after == base:
        return "" if after else None
    try:
        parse_reference(after)
    except UnknownAdapter as error:
        raise InvalidRequest("`after` is the id of a model.", param="after") from error
    return after


@router.get("/models/{name:path}", responses=returns(Model) | error_statuses(404))
async def get_model(service: ServiceDep, name: str) -> JsonResponse:
    """One of them."""
    if name == service.base.name:
        return JsonResponse(base_object(service))
    try:
        return JsonResponse(item(service, name, _meant(service, name)))
    except UnknownAdapter as error:
        raise UnknownModel(name) from error


def _meant(service: Service, name: str) -> Version | Alias:
    try:
        return service.registry.alias(name)
    except UnknownAdapter:
        return service.registry.version(name)


def base_object(service: Service) -> JsonObject:
    """The base as a model."""
    return _card(service, service.base.name, service.created, root=service.base.name, parent=None)


def item(service: Service, name: str, meant: Version | Alias) -> JsonObject:
    """A name as a model. An adapter's root is its content: the folder it came from is nobody's business."""
    root = meant.name if isinstance(meant, Alias) else meant.content
    return _card(service, name, meant.created, root=root, parent=service.base.name)


def _card(service: Service, name: str, created: int, *, root: str, parent: str | None) -> JsonObject:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "manylora",
        "root": root,
        "parent": parent,
        "max_model_len": service.base.max_model_len,
    }
