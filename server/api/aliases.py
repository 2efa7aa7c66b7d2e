"""``/v1/aliases``: names that mean one of several adapters or versions, by weight."""

from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from adapters.names import parse_reference
from adapters.snapshot import Target
from server.api.cards import alias_card
from server.api.changes import AliasRequest, TargetEntry
from server.api.errors import Json
from server.api.etag import Expected, etag
from server.api.listing import After, Card, Limit, listing
from server.api.service import Served

router = APIRouter(prefix="/v1/aliases")


@router.get("")
async def list_aliases(service: Served, after: After = None, limit: Limit = None) -> Response:
    """Aliases in the order of their names."""

    def page(after: str | None, count: int) -> list[Card]:
        return [alias_card(service.registry, alias) for alias in service.registry.aliases(after or "", count)]

    return listing(page, after, limit)


@router.get("/{name:path}")
async def get_alias(name: str, service: Served) -> Response:
    """One alias."""
    alias = service.registry.alias(name)
    return Json(alias_card(service.registry, alias), headers=etag(alias.revision))


@router.put("/{name:path}")
async def put_alias(name: str, request: AliasRequest, service: Served, expected: Expected) -> Response:
    """Say what an alias means from now on: 201 where it is new, else 200."""
    targets = [_target(entry) for entry in request.targets]
    alias, new = await run_in_threadpool(service.registry.put_alias, name, targets, expected)
    return Json(alias_card(service.registry, alias), 201 if new else 200, etag(alias.revision))


@router.delete("/{name:path}")
async def remove_alias(name: str, service: Served, expected: Expected) -> dict[str, Any]:
    """Forget an alias; what it meant stays."""
    await run_in_threadpool(service.registry.remove_alias, name, expected)
    return {"id": name, "object": "alias", "deleted": True}


def _target(entry: TargetEntry) -> Target:
    reference = parse_reference(entry.adapter)
    return Target(reference.name, reference.version, entry.weight)
