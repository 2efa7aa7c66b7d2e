"""``/v1/aliases``: names that resolve to one of several adapters or versions, by weight."""

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from adapters.registry.names import parse_reference
from adapters.registry.snapshot import Target
from server.api.access.authentication import KeyDep
from server.api.http.errors import JsonResponse
from server.api.http.etag import IfMatch, etag
from server.api.http.json_body import JsonRoute
from server.api.http.openapi import ETAG_HEADER, error_statuses, returns
from server.api.http.pagination import After, JsonObject, Limit, list_response
from server.api.registry.objects import alias_object
from server.api.schemas.registry import AliasRequest, TargetEntry
from server.api.schemas.responses import Alias, Aliases, Deleted
from server.api.service import ServiceDep

router = APIRouter(prefix="/v1/aliases", tags=["aliases"], route_class=JsonRoute)


@router.get("", responses=returns(Aliases) | error_statuses(400))
async def list_aliases(service: ServiceDep, key: KeyDep, after: After = None, limit: Limit = None) -> Response:
    """List aliases by name."""
    view = service.view(key)

    def page(after: str | None, count: int) -> list[JsonObject]:
        return [alias_object(view, alias) for alias in view.aliases(after or "", count)]

    return list_response(page, after, limit)


@router.get("/{name:path}", responses=returns(Alias, headers=ETAG_HEADER) | error_statuses(404))
async def get_alias(name: str, service: ServiceDep, key: KeyDep) -> Response:
    """Show an alias."""
    view = service.view(key)
    alias = view.alias(name)
    return JsonResponse(alias_object(view, alias), headers=etag(alias.revision))


@router.put(
    "/{name:path}",
    responses=returns(Alias, 200, 201, headers=ETAG_HEADER) | error_statuses(400, 404, 409, 412, 413, 503),
)
async def put_alias(name: str, request: AliasRequest, service: ServiceDep, key: KeyDep, expected: IfMatch) -> Response:
    """Create or replace an alias. Returns 201 if it is new, otherwise 200."""
    targets = [_target(entry) for entry in request.targets]
    view = service.view(key)
    alias, new = await run_in_threadpool(view.put_alias, name, targets, expected)
    return JsonResponse(alias_object(view, alias), 201 if new else 200, etag(alias.revision))


@router.delete("/{name:path}", responses=returns(Deleted) | error_statuses(400, 404, 412, 503))
async def remove_alias(name: str, service: ServiceDep, key: KeyDep, expected: IfMatch) -> JsonResponse:
    """Remove an alias. Its targets are not affected."""
    await run_in_threadpool(service.view(key).remove_alias, name, expected)
    return JsonResponse({"id": name, "object": "alias", "deleted": True})


def _target(entry: TargetEntry) -> Target:
    reference = parse_reference(entry.adapter)
    return Target(reference.name, reference.version, entry.weight)
