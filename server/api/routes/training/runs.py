"""``/v1/training/runs``: what ``manylora train`` has left under ``--runs``."""

from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.concurrency import run_in_threadpool

from server.access.key import ApiKey
from server.api.access.authentication import KeyDep
from server.api.http.errors import JsonResponse
from server.api.http.openapi import error_statuses, returns
from server.api.http.pagination import JsonObject
from server.api.schemas.training import RunDetails, Runs
from server.api.service import Service, ServiceDep
from server.errors import InvalidRequest, UnknownRun

router = APIRouter(prefix="/v1/training/runs", tags=["training"])

MAX_RUNS = 1000
Limit = Annotated[int, Query(ge=1, le=MAX_RUNS)]
After = Annotated[str | None, Query(max_length=512, description="Id of the last run of the previous page.")]


@router.get("", responses=returns(Runs) | error_statuses(400))
async def list_runs(service: ServiceDep, key: KeyDep, after: After = None, limit: Limit = 100) -> JsonResponse:
    """List the training runs that the disk knows of, those that have changed last first."""
    return JsonResponse(await run_in_threadpool(_list, service, key, after, limit))


@router.get("/{name:path}", responses=returns(RunDetails) | error_statuses(404))
async def get_run(name: str, service: ServiceDep, key: KeyDep) -> JsonResponse:
    """Show a training run: its settings, data, curves, answers before and after, and judgement."""
    if not key.sees(name):
        raise UnknownRun(name)
    return JsonResponse(await run_in_threadpool(_details, service, key, name))


def _list(service: Service, key: ApiKey, after: str | None, limit: int) -> JsonObject:
    found, complete = service.training_runs.places()
    places = [place for place in found if key.sees(place.name)]
    names = [place.name for place in places]
    if after is not None and after not in names:
        raise InvalidRequest("`after` must be the id of a training run.", param="after")
    first = 0 if after is None else names.index(after) + 1
    summaries = map(service.training_runs.summary, places[first : first + limit])
    return {
        "object": "list",
        "data": [summary for summary in summaries if summary is not None],
        "has_more": len(places) > first + limit,
        "complete": complete,
    }


def _details(service: Service, key: ApiKey, name: str) -> dict[str, Any]:
    run = service.training_runs.find(name)
    content = service.training_runs.content(run)
    versions = (version for entry in service.view(key).entries() for version in entry.versions.values())
    published = [version.name for version in versions if version.content == content]
    return {**run.details(), "published": published}
