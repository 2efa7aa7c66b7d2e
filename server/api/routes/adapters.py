"""``/v1/adapters``: register, list, show, activate, pin and remove adapters."""

from dataclasses import asdict
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Scope

from adapters.registry.names import parse_reference
from adapters.registry.registration import Registered
from adapters.registry.snapshot import Entry
from server.access.key import ApiKey
from server.api.access.authentication import KeyDep
from server.api.http.errors import JsonResponse
from server.api.http.etag import IfMatch, etag
from server.api.http.json_body import JsonRoute
from server.api.http.openapi import ETAG_HEADER, error_statuses, returns, schema_ref
from server.api.http.pagination import After, JsonObject, Limit, list_response
from server.api.registry.cards import card
from server.api.registry.objects import AdapterObjects
from server.api.registry.registration import register_named, register_upload
from server.api.schemas.registry import ActivateRequest, AdapterRequest, AdapterUpload, PinRequest
from server.api.schemas.responses import Adapter, AdapterDetails, Adapters, Deleted, RegisteredAdapter
from server.api.service import Service, ServiceDep

router = APIRouter(prefix="/v1/adapters", tags=["adapters"], route_class=JsonRoute)

CHANGE_ERRORS = error_statuses(400, 404, 409, 412, 413, 422, 503)


class FormRoute(APIRoute):
    """Matches only requests with a multipart form, so that FastAPI does not parse its files into memory."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child = super().matches(scope)
        return (match, child) if _media_type(Headers(scope=scope)) == "multipart/form-data" else (Match.NONE, {})


async def upload_adapter(request: Request, service: ServiceDep, key: KeyDep, expected: IfMatch) -> Response:
    """Register an adapter from uploaded files."""
    return _registered(service, key, await register_upload(service, key, request, expected))


router.add_api_route("", upload_adapter, methods=["POST"], route_class_override=FormRoute, include_in_schema=False)


async def _json_only(request: Request) -> None:
    kind = _media_type(request.headers)
    if kind != "application/json" and not kind.endswith("+json"):
        raise HTTPException(
            415,
            "To register an adapter, send `application/json`, or `multipart/form-data` to upload its files; the "
            f"content type of this request is {f'`{kind[:80]}`' if kind else 'missing'}.",
        )


@router.post(
    "",
    dependencies=[Depends(_json_only)],
    responses=returns(RegisteredAdapter, 200, 201, headers=ETAG_HEADER)
    | error_statuses(400, 408, 409, 412, 413, 415, 422, 429, 503, 507),
    openapi_extra={"requestBody": {"content": {"multipart/form-data": {"schema": schema_ref(AdapterUpload)}}}},
)
async def register_adapter(request: AdapterRequest, service: ServiceDep, key: KeyDep, expected: IfMatch) -> Response:
    """Register an adapter from a folder under the server's `--adapter-root`, a remote source, or uploaded files.

    Returns 201, or 200 if the name already has a version with the same content.
    """
    return _registered(service, key, await register_named(service, key, request, expected))


@router.get("", responses=returns(Adapters) | error_statuses(400))
async def list_adapters(service: ServiceDep, key: KeyDep, after: After = None, limit: Limit = None) -> Response:
    """List adapters by name, and the sub-folders of the watched folder that could not be registered."""
    view = service.view(key)
    usage = view.usage()
    refused = service.watched_folder.refusals() if service.watched_folder is not None else []
    more = {
        "refused": [asdict(refusal) for refusal in refused if view.sees(refusal.name)],
        "store": {"bytes": usage.bytes, "quota_bytes": usage.quota_bytes},
    }

    def page(after: str | None, count: int) -> list[JsonObject]:
        objects = _objects(service, key)
        return [objects.adapter(entry) for entry in view.entries(after or "", count)]

    return list_response(page, after, limit, more)


Include = Annotated[
    list[Literal["card"]],
    Query(description="`card` adds the model card, the trainer's manifest, the loss curves and the samples."),
]


@router.get(
    "/{reference:path}", responses=returns(AdapterDetails, headers=ETAG_HEADER) | error_statuses(400, 404, 503, 507)
)
async def get_adapter(reference: str, service: ServiceDep, key: KeyDep, include: Include = []) -> Response:  # noqa: B006
    """Show an adapter with the details of its versions, or a single version, with the receipt of its checks."""
    parsed, view = parse_reference(reference), service.view(key)
    entry = view.entry(parsed.name)
    objects = _objects(service, key)
    if parsed.version is None:
        version = entry.current
        item = {**objects.adapter(entry), "version_details": objects.version_details(entry)}
    else:
        version = view.version(reference)
        item = objects.version(entry, version)
    receipt = None if version is None else await run_in_threadpool(view.receipt, version)
    answer = {**item, "receipt": receipt}
    if "card" in include:
        # Held-out rows are training data, which /v1/training guards with the scope `train`.
        rows = key.may("train") or key.may("adapters")
        found = None if version is None else await run_in_threadpool(card, service.store, version, samples=rows)
        answer["card"] = found
    return JsonResponse(answer, headers=etag(entry.revision))


@router.post("/{name:path}/activate", responses=returns(Adapter, headers=ETAG_HEADER) | CHANGE_ERRORS)
async def activate_adapter(
    name: str, request: ActivateRequest, service: ServiceDep, key: KeyDep, expected: IfMatch
) -> Response:
    """Switch the adapter to another of its versions, atomically."""
    entry = await run_in_threadpool(service.view(key).activate, name, request.version, expected)
    return _answer(service, key, entry)


@router.post("/{name:path}/pin", responses=returns(Adapter, headers=ETAG_HEADER) | CHANGE_ERRORS)
async def pin_adapter(name: str, request: PinRequest, service: ServiceDep, key: KeyDep, expected: IfMatch) -> Response:
    """Pin the active version to the device, or unpin it."""
    entry = await run_in_threadpool(service.view(key).pin, name, request.pinned, expected)
    return _answer(service, key, entry)


@router.delete("/{reference:path}", responses=returns(Deleted) | error_statuses(400, 404, 409, 412, 503))
async def remove_adapter(reference: str, service: ServiceDep, key: KeyDep, expected: IfMatch) -> JsonResponse:
    """Remove an adapter or a version. Requests that already run keep its content until they end."""
    await run_in_threadpool(service.view(key).remove, reference, expected)
    return JsonResponse({"id": reference, "object": "adapter", "deleted": True})


def _objects(service: Service, key: ApiKey) -> AdapterObjects:
    return AdapterObjects(service.engine.stats(), service.view(key).aliased_to)


def _answer(service: Service, key: ApiKey, entry: Entry) -> JsonResponse:
    return JsonResponse(_objects(service, key).adapter(entry), headers=etag(entry.revision))


def _registered(service: Service, key: ApiKey, registered: Registered) -> JsonResponse:
    item = {**_objects(service, key).adapter(registered.entry), "version": registered.version.number}
    return JsonResponse(item, 201 if registered.new else 200, etag(registered.entry.revision))


def _media_type(headers: Headers) -> str:
    return headers.get("content-type", "").partition(";")[0].strip().lower()
