"""Build the JSON objects that responses contain for adapters, versions and aliases."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from adapters.errors import UnknownAdapter
from adapters.format.spec import AdapterId
from adapters.registry.snapshot import Alias, Entry, Version
from server.access.view import RegistryView
from server.api.http.pagination import JsonObject
from server.engine.stats import EngineStats

_VERSION_FIELDS = ("content", "rank", "targets", "size_bytes", "source", "residency", "status")


@dataclass(frozen=True, slots=True)
class AdapterObjects:
    """Builds the JSON objects of adapters and versions, all from one snapshot of the engine."""

    stats: EngineStats
    aliases_of: Callable[[str], Sequence[str]]
    """Adapter name -> aliases that have it as a target, in order."""

    def adapter(self, entry: Entry) -> JsonObject:
        """Return an adapter with the fields of its active version, which are null if no version is active."""
        fields = dict.fromkeys(_VERSION_FIELDS) if entry.current is None else self._version_fields(entry.current)
        return {"id": entry.name, **self._adapter_fields(entry), "created": entry.created, **fields}

    def version(self, entry: Entry, version: Version) -> JsonObject:
        """Return one version of an adapter."""
        fields = self._version_fields(version)
        return {"id": version.name, **self._adapter_fields(entry), "created": version.created, **fields}

    def version_details(self, entry: Entry) -> list[JsonObject]:
        """Return the details of all versions of an adapter."""
        return [
            {"version": version.number, "created": version.created, **self._version_fields(version)}
            for version in entry.versions.values()
        ]

    def _adapter_fields(self, entry: Entry) -> JsonObject:
        return {
            "object": "adapter",
            "active": entry.active,
            "pinned": entry.pinned,
            "aliases": list(self.aliases_of(entry.name)),
            "versions": list(entry.versions),
        }

    def _version_fields(self, version: Version) -> dict[str, Any]:
        return {
            "content": version.content,
            "rank": version.rank,
            "targets": version.targets,
            "size_bytes": version.size_bytes,
            "source": version.source,
            "residency": residency(version.content, self.stats),
            **({"status": "ready"} if version.refused is None else {"status": "refused", "reason": version.refused}),
        }


def residency(content: AdapterId, stats: EngineStats) -> Literal["device", "host", "disk"]:
    """Return the fastest memory that holds the content."""
    if content in stats.device_adapters:
        return "device"
    return "host" if content in stats.host_adapters else "disk"


def alias_object(registry: RegistryView, alias: Alias) -> JsonObject:
    """Return an alias with the version that each of its targets currently resolves to, as far as the key sees them."""
    targets = [
        {"adapter": target.reference, "weight": target.weight, "serves": _resolve(registry, target.reference)}
        for target in alias.targets
        if registry.sees(target.adapter)
    ]
    return {"id": alias.name, "object": "alias", "created": alias.created, "targets": targets}


def _resolve(registry: RegistryView, reference: str) -> str | None:
    try:
        return registry.version(reference).name
    except UnknownAdapter:  # removed in the meantime
        return None
