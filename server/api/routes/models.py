"""``GET /v1/models``: the base, adapters, aliases and versions, in the format of OpenAI's models."""

from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import Response

from adapters.errors import UnknownAdapter
from adapters.registry.names import parse_reference
from adapters.registry.snapshot import Alias, Version
from server.access.view import RegistryView
from server.api.access.authentication import KeyDep
from server.api.http.errors import JsonResponse
from server.api.http.openapi import error_statuses, returns
from server.api.http.pagination import After, JsonObject, Limit, list_response
from server.api.schemas.registry import Flag
from server.api.schemas.responses import Model, Models
from server.api.service import Service, ServiceDep
from server.errors import InvalidRequest, UnknownModel

router = APIRouter(prefix="/v1", tags=["models"])


Versions = Annotated[Flag, Query(description="Whether to list every version of every adapter, too.")]


@router.get("/models", responses=returns(Models) | error_statuses(400))
async def list_models(
    service: ServiceDep, key: KeyDep, after: After = None, limit: Limit = None, versions: Versions = False
) -> Response:
    """List what requests may name, whether loaded or not: the base, then adapters and aliases by name.

    Every version of an adapter can be named, too, but is listed on request only: clients show this list to people.
    """
    base, view = service.base.name, service.view(key)
    start = _start(after, base)

    def read_page(after: str | None, count: int) -> list[JsonObject]:
        base_first = [base_object(service)] if after is None else []
        names = view.names(after or "", count - len(base_first), versions=versions)
        return base_first + [model_object(service, name, target) for name, target in names]

    return list_response(read_page, start, limit)


def _start(after: str | None, base: str) -> str | None:
    """Return the registry's name after which the page starts: ``""`` starts with its first name, None with the base."""
    if not after or after == base:
        return "" if after else None
    try:
        parse_reference(after)
    except UnknownAdapter as error:
        raise InvalidRequest("`after` must be the id of a model.", param="after") from error
    return after


@router.get("/models/{name:path}", responses=returns(Model) | error_statuses(404))
async def get_model(service: ServiceDep, key: KeyDep, name: str) -> JsonResponse:
    """Show a model."""
    if name == service.base.name:
        return JsonResponse(base_object(service))
    try:
        return JsonResponse(model_object(service, name, _find(service.view(key), name)))
    except UnknownAdapter as error:
        raise UnknownModel(name) from error


def _find(view: RegistryView, name: str) -> Version | Alias:
    try:
        return view.alias(name)
    except UnknownAdapter:
        return view.version(name)


def base_object(service: Service) -> JsonObject:
    """Return the base as a model."""
    return _model(service, service.base.name, service.created, root=service.base.name, parent=None)


def model_object(service: Service, name: str, target: Version | Alias) -> JsonObject:
    """Return a version or an alias as a model. A version's root is its content: its original path is not public."""
    root = target.name if isinstance(target, Alias) else target.content
    return _model(service, name, target.created, root=root, parent=service.base.name)


def _model(service: Service, name: str, created: int, *, root: str, parent: str | None) -> JsonObject:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "manylora",
        "root": root,
        "parent": parent,
        "max_model_len": service.base.max_model_len,
    }
