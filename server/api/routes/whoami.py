"""``GET /v1/whoami``: what the key of a request allows, and the facts about the server that its page shows."""

from dataclasses import asdict
from importlib.metadata import version

from fastapi import APIRouter

from adapters.format.archive import max_bytes
from server import training_data
from server.access.key import ALL_SCOPES, ApiKey
from server.api.access.authentication import KeyDep
from server.api.http.errors import JsonResponse
from server.api.http.openapi import returns
from server.api.schemas.keys import Whoami
from server.api.service import Service, ServiceDep

router = APIRouter(prefix="/v1", tags=["keys"])


@router.get("/whoami", responses=returns(Whoami))
async def whoami(service: ServiceDep, key: KeyDep) -> JsonResponse:
    """Return what the request's key allows and sees, and facts about the server.

    A server without keys answers as to a key that allows everything.
    """
    return JsonResponse(
        {
            "object": "whoami",
            "keys": service.keyring.required,
            "id": key.id,
            "name": key.name,
            "scopes": sorted(scope for scope in ALL_SCOPES if key.may(scope)),
            "adapters": None if key.adapters is None else list(key.adapters),
            "limits": asdict(key.limits),
            "expires": None if key.expires is None else int(key.expires.timestamp()),
            "server": _server(service, key),
            "features": _features(service),
        }
    )


def _server(service: Service, key: ApiKey) -> dict[str, object]:
    settings = service.settings
    admin = key.may("admin")
    return {
        "version": version("manylora"),
        "base": service.base.name,
        "base_fingerprint": service.base.layout.fingerprint,
        "max_model_len": service.base.max_model_len,
        "max_rank": settings.max_rank,
        "max_device_adapters": settings.max_device_adapters,
        "max_upload_bytes": max_bytes(service.store.limit),
        "max_data_bytes": training_data.MAX_BYTES,
        "max_body_bytes": int(settings.max_body_mib * 2**20),
        # What `manylora train` needs on this machine. Paths of it are for those who run it.
        "model": settings.model if admin else None,
        "data_dir": str(settings.data_dir.resolve()) if admin else None,
    }


def _features(service: Service) -> list[str]:
    found = {
        "chat": service.codec.template is not None,
        "training_runs": True,
        "training_data": training_data.available(),
        "register_path": service.settings.adapter_root is not None,
        "register_source": bool(service.settings.allow_source),
    }
    return [name for name, there in found.items() if there]
