"""EngineHooks: the registry's hooks, carried out by the engine that serves its adapters."""

from collections.abc import Collection, Sequence
from typing import Any

from adapters.errors import AdapterConflict
from adapters.format.spec import AdapterId, AdapterSpec
from adapters.registry.hooks import RegistryHooks
from adapters.registry.snapshot import Version
from bases.base import Base
from server.config import Settings
from server.dry_load import DryLoad
from server.engine.engine import Engine
from server.engine.sequence import WeightedAdapter
from server.errors import InvalidRequest
from server.text.adapter_templates import AdapterTemplates


class EngineHooks(RegistryHooks):
    """Connects the registry to the engine that serves its adapters."""

    def __init__(
        self, base: Base, settings: Settings, engine: Engine, dry_load: DryLoad, templates: AdapterTemplates
    ) -> None:
        layout = base.layout
        super().__init__(
            layout.fingerprint,
            equivalents=layout.equivalents,
            max_rank=settings.max_rank,
            reserved=frozenset({base.name}),
        )
        self._engine = engine
        self._dry_load = dry_load
        self._templates = templates

    def dry_load(self, spec: AdapterSpec, keep: bool) -> dict[str, Any]:
        """Try the chat template, and run the dry load. Raises AdapterConflict if pinned adapters leave no space."""
        self._templates.check(spec.id)
        try:
            return self._dry_load.measure(spec, keep=keep)
        except InvalidRequest as error:
            raise AdapterConflict(str(error), code="too_many_pins") from error

    def can_pin(self, ranks: Collection[int]) -> bool:
        """Whether the device can hold pinned adapters of these ranks and one more adapter."""
        return self._engine.can_pin(ranks)

    def pins_changed(self, versions: Sequence[Version]) -> None:
        """Pin these in the engine, and unpin all others."""
        self._engine.pin([WeightedAdapter(version.content, 1.0, version.rank) for version in versions])

    def content_unused(self, content: AdapterId) -> None:
        """Drop it from host memory and the device."""
        self._engine.remove_adapter(content)
