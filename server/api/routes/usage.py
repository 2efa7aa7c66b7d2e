"""``GET /v1/usage``: requests and tokens by key, adapter and day."""

from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query
from sqlalchemy import Row
from starlette.concurrency import run_in_threadpool

from server.access.key import ANONYMOUS
from server.access.key_store import KeyStore
from server.access.usage_table import DIMENSIONS, Dimension, UsageFilter
from server.api.access.authentication import KeyDep
from server.api.http.errors import JsonResponse
from server.api.http.openapi import error_statuses, returns
from server.api.http.pagination import After, JsonObject, RowLimit, page_response
from server.api.schemas.usage import Usages
from server.api.service import Service, ServiceDep
from server.errors import InvalidRequest

router = APIRouter(prefix="/v1", tags=["access"])

NOTHING = "-"
"""In ids, the base alone or no key: neither an adapter nor a key has this name."""
Start = Annotated[date | None, Query(description="The first day (UTC); by default the first of this month.")]
End = Annotated[date | None, Query(description="The last day, included; by default today.")]
KeyWord = Annotated[str | None, Query(alias="key", max_length=128, description="Id of a key.")]
AdapterWord = Annotated[
    str | None,
    Query(
        max_length=256,
        description="A version, or a name for all its versions; mixes with it count, too. Empty: the base alone.",
    ),
]
GroupBy = Annotated[list[Dimension] | None, Query(description="What to sum by; may be repeated. By default all three.")]


@router.get("/usage", responses=returns(Usages) | error_statuses(400, 503))
async def list_usage(
    service: ServiceDep,
    caller: KeyDep,
    start: Start = None,
    end: End = None,
    key: KeyWord = None,
    adapter: AdapterWord = None,
    group_by: GroupBy = None,
    after: After = None,
    limit: RowLimit = 1000,
) -> JsonResponse:
    """Return what was used: by all keys to an admin's key, by itself to any other.

    Days and months are in UTC. What other servers have used shows within a second.
    """
    today = datetime.now(UTC).date()
    wanted = UsageFilter(start or today.replace(day=1), end or today, key, adapter)
    if not caller.may("admin"):
        wanted = UsageFilter(wanted.start, wanted.end, caller.id, adapter)
        if key not in (None, caller.id):  # what a key must not see is the same as what is not there
            return page_response([], limit)
    by = [name for name in DIMENSIONS if name in (group_by or DIMENSIONS)]
    place = None if after is None else _place(after, by)
    return page_response(await run_in_threadpool(_read, service, wanted, by, place, limit + 1), limit)


def _read(
    service: Service, wanted: UsageFilter, by: Sequence[Dimension], after: Sequence[Any] | None, count: int
) -> list[JsonObject]:
    service.usage.flush()
    rows = service.usage.table.read(wanted, by, after, count)
    names = key_names(service.keyring.store, {row.key for row in rows} if "key" in by else set())
    return [_item(row, by, names) for row in rows]


def _item(row: Row[Any], by: Sequence[Dimension], names: Mapping[str, str]) -> JsonObject:
    values = {name: str(getattr(row, name)) for name in by}
    key = values.get("key")
    return {
        "id": "/".join(value or NOTHING for value in values.values()),
        "object": "usage",
        **{name: values.get(name) for name in DIMENSIONS},
        "key_name": None if key is None else names.get(key),
        "requests": int(row.requests),
        "prompt_tokens": int(row.prompt_tokens),
        "cached_tokens": int(row.cached_tokens),
        "output_tokens": int(row.output_tokens),
    }


def _place(after: str, by: Sequence[Dimension]) -> list[Any]:
    """Return the values of the last row of a page, from its id. Only the last of them, an adapter, may have slashes."""
    words = after.split("/", len(by) - 1)
    try:
        if len(words) < len(by):
            raise ValueError("too few parts")
        pairs = zip(by, words, strict=True)
        return [date.fromisoformat(word) if name == "day" else "" if word == NOTHING else word for name, word in pairs]
    except ValueError as error:
        raise InvalidRequest("`after` must be the id of a row with the same `group_by`.", param="after") from error


def key_names(store: KeyStore, ids: Collection[str]) -> Mapping[str, str]:
    """Return the names of keys by their ids, also of revoked ones. Those that this server does not know are left out.

    Queries the database for revoked ones.
    """
    given = {id_: id_.partition(":")[2] for id_ in ids if ":" in id_}  # by a file or the environment
    return {"": ANONYMOUS.name, **given, **store.names({id_ for id_ in ids if id_ and id_ not in given})}
