"""``/v1/adapters``: register, list, look at and remove adapters."""

import asyncio
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response

from adapters.files import FILES
from adapters.registry import Adapter
from server.api.schemas import AdapterRequest
from server.api.service import Served
from server.engine import EngineStats
from server.errors import InvalidRequest

router = APIRouter(prefix="/v1/adapters")


@router.post("")
async def register_adapter(request: AdapterRequest, service: Served, response: Response) -> dict[str, Any]:
    """Register a PEFT folder under ``adapter_root``: 201, or 200 where a known name now means this content."""
    service.switchboard.check_open()
    folder = await asyncio.to_thread(allowed_folder, service.settings.adapter_root, request.path)
    adapter, replaced = await asyncio.to_thread(service.registry.register, request.name, folder)
    response.status_code = 200 if replaced else 201
    return describe(adapter, service.engine.stats())


@router.get("")
async def list_adapters(
    service: Served, after: str = "", limit: Annotated[int | None, Query(ge=1)] = None
) -> dict[str, Any]:
    """All adapters in the order of their names; those after ``after``, at most ``limit``."""
    stats = service.engine.stats()
    adapters = [adapter for adapter in service.registry.list() if adapter.name > after]
    page = [describe(adapter, stats) for adapter in adapters[:limit]]
    return {"object": "list", "data": page, "has_more": len(page) < len(adapters)}


@router.get("/{name:path}")
async def get_adapter(name: str, service: Served) -> dict[str, Any]:
    """One adapter."""
    return describe(service.registry.get(name), service.engine.stats())


@router.delete("/{name:path}")
async def remove_adapter(name: str, service: Served) -> dict[str, Any]:
    """Forget the name at once; requests that already run keep the content until they end."""
    await asyncio.to_thread(service.registry.remove, name)
    return {"id": name, "object": "adapter", "deleted": True}


def describe(adapter: Adapter, stats: EngineStats) -> dict[str, Any]:
    """What is known of an adapter, and where its content is now."""
    spec = adapter.spec
    return {
        "id": adapter.name,
        "object": "adapter",
        "created": adapter.created,
        "content": spec.id,
        "rank": spec.rank,
        "targets": len(spec.targets),
        "size_bytes": spec.size_bytes,
        "residency": residency(adapter, stats),
    }


def residency(adapter: Adapter, stats: EngineStats) -> Literal["device", "host", "disk"]:
    """The place nearest to the device that has the content."""
    if adapter.spec.id in stats.device:
        return "device"
    return "host" if adapter.spec.id in stats.host else "disk"


def allowed_folder(root: Path | None, path: str) -> Path:
    """The folder that ``path``, absolute or relative to ``root``, leads to through all symlinks.

    Raises InvalidRequest where it, or one of the adapter's files in it, is not under ``root``.
    """
    if root is None:
        raise InvalidRequest(
            "This server takes no adapters by path: it was started without --adapter-root.", param="path"
        )
    root = root.resolve()
    try:
        folder = (root / path).resolve()
        places = [folder, *((folder / name).resolve() for name in FILES)]
        inside = all(place.is_relative_to(root) for place in places)
        exists = inside and folder.is_dir()
    except (OSError, RuntimeError) as error:
        raise InvalidRequest("The path cannot be followed.", param="path") from error
    if not inside:
        raise InvalidRequest("The path leads out of the server's --adapter-root.", param="path")
    if not exists:
        raise InvalidRequest("There is no such folder under the server's --adapter-root.", param="path")
    return folder
