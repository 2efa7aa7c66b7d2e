"""``GET /v1/models``: the base and its adapters, as OpenAI lists models."""

from typing import Annotated, Any

from fastapi import APIRouter, Query

from adapters.errors import UnknownAdapter
from adapters.registry import Adapter
from server.api.service import Served, Service
from server.errors import UnknownModel

router = APIRouter(prefix="/v1")


@router.get("/models")
@router.head("/models", include_in_schema=False)
async def list_models(
    service: Served, after: str | None = None, limit: Annotated[int | None, Query(ge=1)] = None
) -> dict[str, Any]:
    """The base, then the adapters in the order of their names; those after ``after``, at most ``limit``."""
    base = service.base.name
    cards = [base_card(service)] if after is None else []
    adapters = [a for a in service.registry.list() if after in (None, base) or a.name > str(after)]
    cards += [adapter_card(service, adapter) for adapter in adapters]
    page = cards[:limit]
    return {"object": "list", "data": page, "has_more": len(page) < len(cards)}


@router.get("/models/{name:path}")
async def get_model(service: Served, name: str) -> dict[str, Any]:
    """One of them."""
    if name == service.base.name:
        return base_card(service)
    try:
        return adapter_card(service, service.registry.get(name))
    except UnknownAdapter as error:
        raise UnknownModel(name) from error


def base_card(service: Service) -> dict[str, Any]:
    """The base as a model."""
    return _card(service, service.base.name, service.created, root=service.base.name, parent=None)


def adapter_card(service: Service, adapter: Adapter) -> dict[str, Any]:
    """An adapter as a model. Its root is its content: the folder it came from is nobody's business."""
    return _card(service, adapter.name, adapter.created, root=adapter.spec.id, parent=service.base.name)


def _card(service: Service, name: str, created: int, *, root: str, parent: str | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "manylora",
        "root": root,
        "parent": parent,
        "max_model_len": service.base.max_model_len,
    }
