"""AdapterObjects: what an answer says of an adapter, a version or an alias."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from adapters.errors import UnknownAdapter
from adapters.format.spec import AdapterId
from adapters.registry.registry import Registry
from adapters.registry.snapshot import Alias, Entry, Version
from server.api.http.pagination import JsonObject
from server.engine.engine import EngineStats

_OF_A_VERSION = ("content", "rank", "targets", "size_bytes", "residency", "status")


@dataclass(frozen=True, slots=True)
class AdapterObjects:
    """Makes the cards of adapters from what is true at one moment."""

    stats: EngineStats
    aliased_to: Callable[[str], Sequence[str]]
    """Adapter -> the aliases that may mean it, in order."""

    def adapter(self, entry: Entry) -> JsonObject:
        """An adapter, with the particulars of its active version; null where it has none."""
        particulars = dict.fromkeys(_OF_A_VERSION) if entry.current is None else self._particulars(entry.current)
        return {"id": entry.name, **self._common(entry), "created": entry.created, **particulars}

    def version(self, entry: Entry, version: Version) -> JsonObject:
        """One version of an adapter."""
        return {"id": version.name, **self._common(entry), "created": version.created, **self._particulars(version)}

    def version_details(self, entry: Entry) -> list[JsonObject]:
        """The particulars of all versions of an adapter, for its own item; every item has their numbers."""
        return [
            {"version": each.number, "created": each.created, **self._particulars(each)}
            for each in entry.versions.values()
        ]

    def _common(self, entry: Entry) -> JsonObject:
        return {
            "object": "adapter",
            "active": entry.active,
            "pinned": entry.pinned,
            "aliases": list(self.aliased_to(entry.name)),
            "versions": list(entry.versions),
        }

    def _particulars(self, version: Version) -> dict[str, Any]:
        return {
            "content": version.content,
            "rank": version.rank,
            "targets": version.targets,
            "size_bytes": version.size_bytes,
            "residency": residency(version.content, self.stats),
            **({"status": "ready"} if version.refused is None else {"status": "refused", "reason": version.refused}),
        }


def residency(content: AdapterId, stats: EngineStats) -> Literal["device", "host", "disk"]:
    """The place nearest to the device that has the content."""
    if content in stats.device:
        return "device"
    return "host" if content in stats.host else "disk"


def alias_object(registry: Registry, alias: Alias) -> JsonObject:
    """An alias, and which version each of its targets means now."""
    targets = [
        {"adapter": target.reference, "weight": target.weight, "serves": _serves(registry, target.reference)}
        for target in alias.targets
    ]
    return {"id": alias.name, "object": "alias", "created": alias.created, "targets": targets}


def _serves(registry: Registry, reference: str) -> str | None:
    try:
        return registry.version(reference).name
    except UnknownAdapter:  # it goes while the item is made
        return None
