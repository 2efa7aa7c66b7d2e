"""``GET /v1/audit``: every change, and who made it."""

from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query
from sqlalchemy import Row
from starlette.concurrency import run_in_threadpool

from adapters.registry import audit
from adapters.registry.audit import Action, AuditFilter
from server.api.http.errors import JsonResponse
from server.api.http.openapi import error_statuses, returns
from server.api.http.pagination import After, JsonObject, RowLimit, page_response
from server.api.schemas.usage import AuditEntries
from server.api.service import ServiceDep
from server.errors import InvalidRequest

router = APIRouter(prefix="/v1", tags=["access"])

Moment = Annotated[datetime | None, Query(description="ISO 8601, UTC unless it says otherwise, or Unix time.")]


@router.get("/audit", responses=returns(AuditEntries) | error_statuses(400, 403, 503))
async def list_audit_entries(
    service: ServiceDep,
    since: Moment = None,
    until: Moment = None,
    key: Annotated[str | None, Query(max_length=128, description="Id or name of a key.")] = None,
    name: Annotated[str | None, Query(max_length=256, description="What was changed, without a version.")] = None,
    action: Action | None = None,
    after: After = None,
    limit: RowLimit = 100,
) -> JsonResponse:
    """Return changes of adapters, aliases and keys, the latest first; `until` itself is not included."""
    wanted = AuditFilter(_microseconds(since), _microseconds(until), key, name, action)
    before = None if after is None else _id(after)
    rows = await run_in_threadpool(audit.read, service.database, wanted, before, limit + 1)
    return page_response([_item(row) for row in rows], limit)


def _item(row: Row[Any]) -> JsonObject:
    return {
        "id": str(row.id),
        "object": "audit_entry",
        "created": row.at // 1_000_000,
        "action": row.action,
        "name": row.name,
        "detail": row.detail,
        "key": row.key,
        "key_name": row.key_name,
        "address": row.address,
        "request_id": row.request_id,
    }


def _microseconds(moment: datetime | None) -> int | None:
    """Return Unix time in microseconds."""
    if moment is None:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return int(moment.timestamp() * 1_000_000)


def _id(after: str) -> int:
    if not (after.isascii() and after.isdecimal() and len(after) < 10):
        raise InvalidRequest("`after` must be the id of an entry.", param="after")
    return int(after)
