"""``/v1/keys``: make, list, rotate and revoke API keys. Those of files and of the environment are not here."""

import time
from itertools import islice

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from server.api.http.errors import JsonResponse
from server.api.http.json_body import JsonRoute
from server.api.http.openapi import error_statuses, returns
from server.api.http.pagination import After, JsonObject, Limit, list_response
from server.api.schemas.keys import Key, KeyRequest, Keys, NewKey, RotateRequest
from server.api.schemas.responses import Deleted
from server.api.service import ServiceDep
from server.errors import InvalidRequest, UnknownKey

router = APIRouter(prefix="/v1/keys", tags=["keys"], route_class=JsonRoute)


@router.post("", status_code=201, responses=returns(NewKey, 201) | error_statuses(400, 409, 413, 503))
async def create_key(request: KeyRequest, service: ServiceDep) -> JsonResponse:
    """Make a key. From the first one on, every request needs a key."""
    if request.expires is not None and request.expires <= time.time():
        raise InvalidRequest("`expires` is in the past.", param="expires")
    stored, secret = await run_in_threadpool(service.keyring.store.add, request.spec)
    return JsonResponse({**stored.to_json(), "secret": secret}, 201)


@router.get("", responses=returns(Keys) | error_statuses(400, 503))
async def list_keys(service: ServiceDep, after: After = None, limit: Limit = None) -> Response:
    """List the keys that are not revoked, oldest first."""
    store = service.keyring.store
    places: dict[str | None, tuple[int, str]] = {}
    """Where the keys are in the order, by their ids: those that pages begin after, which may be revoked meanwhile."""
    try:
        if after is not None:
            places[after] = (await run_in_threadpool(store.get, after)).order
    except UnknownKey as error:
        raise InvalidRequest("`after` must be the id of a key.", param="after") from error

    def page(after: str | None, count: int) -> list[JsonObject]:
        last = places.get(after)
        found = list(islice((each for each in store.stored() if last is None or each.order > last), count))
        places.clear()
        places.update((each.key.id, each.order) for each in found)
        return [each.to_json() for each in found]

    return list_response(page, after, limit)


@router.get("/{id}", responses=returns(Key) | error_statuses(404, 503))
async def get_key(id: str, service: ServiceDep) -> JsonResponse:
    """Show a key, which may be revoked."""
    return JsonResponse((await run_in_threadpool(service.keyring.store.get, id)).to_json())


@router.delete("/{id}", responses=returns(Deleted) | error_statuses(404, 503))
async def revoke_key(id: str, service: ServiceDep) -> JsonResponse:
    """Revoke a key: this server accepts it no more, and others within a second. Its running requests end normally."""
    await run_in_threadpool(service.keyring.store.revoke, id)
    return JsonResponse({"id": id, "object": "key", "deleted": True})


@router.post("/{id}/rotate", responses=returns(NewKey) | error_statuses(400, 404, 413, 503))
async def rotate_key(id: str, request: RotateRequest, service: ServiceDep) -> JsonResponse:
    """Give a key another secret. The old one ends now, or after the time that the request asks for."""
    stored, secret = await run_in_threadpool(service.keyring.store.rotate, id, request.overlap_seconds)
    return JsonResponse({**stored.to_json(), "secret": secret})
