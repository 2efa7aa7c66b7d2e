"""``/v1/adapters``: register, list, look at, activate, pin and remove adapters."""

from dataclasses import asdict

from fastapi import APIRouter, Depends, Request
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
from server.api.http.document import ETAG, answer, reference, refusals
from server.api.http.errors import Json
from server.api.http.etag import Expected, etag
from server.api.http.listing import After, Card, Limit, listing
from server.api.registry.cards import Cards
from server.api.registry.registration import register_named, register_upload
from server.api.schemas.answers import Adapter, AdapterDetails, Adapters, Deleted, RegisteredAdapter
from server.api.schemas.registry import ActivateRequest, AdapterRequest, AdapterUpload, PinRequest
from server.api.service import Served, Service

router = APIRouter(prefix="/v1/adapters", tags=["adapters"])

CHANGE_REFUSALS = refusals(400, 404, 409, 412, 413, 422, 503)


class FormRoute(APIRoute):
    """Matches requests whose body is a form with files; they are never parsed into memory."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child = super().matches(scope)
        return (match, child) if _media_type(Headers(scope=scope)) == "multipart/form-data" else (Match.NONE, {})


async def upload_adapter(request: Request, service: Served, expected: Expected) -> Response:
    """Register uploaded files."""
    return _registered(service, await register_upload(service, request, expected))


router.add_api_route("", upload_adapter, methods=["POST"], route_class_override=FormRoute, include_in_schema=False)


async def _json_only(request: Request) -> None:
    kind = _media_type(request.headers)
    if kind != "application/json" and not kind.endswith("+json"):
        raise HTTPException(
            415,
            "An adapter is registered with a body of `application/json`, or `multipart/form-data` to upload its files; "
            f"this one is {f'`{kind[:80]}`' if kind else 'of no declared type'}.",
        )


@router.post(
    "",
    dependencies=[Depends(_json_only)],
    responses=answer(RegisteredAdapter, 200, 201, headers=ETAG)
    | refusals(400, 408, 409, 412, 413, 415, 422, 429, 503, 507),
    openapi_extra={"requestBody": {"content": {"multipart/form-data": {"schema": reference(AdapterUpload)}}}},
)
async def register_adapter(request: AdapterRequest, service: Served, expected: Expected) -> Response:
    """Register a folder under the server's `--adapter-root`, an address, or uploaded files.

    201, or 200 where the name had this content already.
    """
    return _registered(service, await register_named(service, request, expected))


@router.get("", responses=answer(Adapters) | refusals(400))
async def list_adapters(service: Served, after: After = None, limit: Limit = None) -> Response:
    """Adapters in the order of their names; and which sub-folders of the watched one were refused."""
    usage = service.registry.usage()
    refused = service.watch.refusals() if service.watch is not None else []
    more = {
        "refused": [asdict(refusal) for refusal in refused],
        "store": {"bytes": usage.bytes, "quota_bytes": usage.quota_bytes},
    }

    def page(after: str | None, count: int) -> list[Card]:
        cards = _cards(service)
        return [cards.adapter(entry) for entry in service.registry.entries(after or "", count)]

    return listing(page, after, limit, more)


@router.get("/{reference:path}", responses=answer(AdapterDetails, headers=ETAG) | refusals(404, 503))
async def get_adapter(reference: str, service: Served) -> Response:
    """An adapter with the details of its versions, or one version; with the receipt of its checks."""
    parsed = parse_reference(reference)
    entry = service.registry.entry(parsed.name)
    cards = _cards(service)
    if parsed.version is None:
        version = entry.current
        card = {**cards.adapter(entry), "version_details": cards.version_details(entry)}
    else:
        version = service.registry.version(reference)
        card = cards.version(entry, version)
    receipt = None if version is None else await run_in_threadpool(service.registry.receipt, version)
    return Json({**card, "receipt": receipt}, headers=etag(entry.revision))


@router.post("/{name:path}/activate", responses=answer(Adapter, headers=ETAG) | CHANGE_REFUSALS)
async def activate_adapter(name: str, request: ActivateRequest, service: Served, expected: Expected) -> Response:
    """Let the name mean another of its versions, from one request to the next."""
    return _answer(service, await run_in_threadpool(service.registry.activate, name, request.version, expected))


@router.post("/{name:path}/pin", responses=answer(Adapter, headers=ETAG) | CHANGE_REFUSALS)
async def pin_adapter(name: str, request: PinRequest, service: Served, expected: Expected) -> Response:
    """Keep the active version on the device, or no longer."""
    return _answer(service, await run_in_threadpool(service.registry.pin, name, request.pinned, expected))


@router.delete("/{reference:path}", responses=answer(Deleted) | refusals(400, 404, 409, 412, 503))
async def remove_adapter(reference: str, service: Served, expected: Expected) -> Json:
    """Forget an adapter or a version at once; requests that already run keep the content until they end."""
    await run_in_threadpool(service.registry.remove, reference, expected)
    return Json({"id": reference, "object": "adapter", "deleted": True})


def _cards(service: Service) -> Cards:
    return Cards(service.engine.stats(), service.registry.aliased_to)


def _answer(service: Service, entry: Entry) -> Json:
    return Json(_cards(service).adapter(entry), headers=etag(entry.revision))


def _registered(service: Service, registered: Registered) -> Json:
    card = {**_cards(service).adapter(registered.entry), "version": registered.version.number}
    return Json(card, 201 if registered.new else 200, etag(registered.entry.revision))


def _media_type(headers: Headers) -> str:
    return headers.get("content-type", "").partition(";")[0].strip().lower()
