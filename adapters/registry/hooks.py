"""RegistryHooks: the interface between a registry and the server around it."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from adapters.format.spec import AdapterId, AdapterSpec
from adapters.registry.snapshot import Version


class RegistryHooks:
    """What a registry asks of, and reports to, the server around it. A server overrides the methods.

    Any thread of the registry's callers may call them, and the registry's own.
    """

    def __init__(
        self,
        base: str,
        *,
        equivalents: frozenset[str] = frozenset(),
        max_rank: int = 256,
        reserved: frozenset[str] = frozenset(),
    ) -> None:
        """``base``: the base's fingerprint; ``equivalents``: other fingerprints that mean it.

        ``max_rank``: the largest rank that is served. ``reserved``: names that no adapter or alias may have.
        """
        self.base = base
        self.equivalents = equivalents
        self.max_rank = max_rank
        self.reserved = reserved

    def dry_load(self, spec: AdapterSpec, keep: bool) -> Mapping[str, Any]:
        """Load stored content onto the device and return what a probe prompt showed, for the receipt.

        ``keep``: leave it on the device afterwards. Raises AdapterRejected if the content cannot be served.
        """
        return {}

    def can_pin(self, ranks: Collection[int]) -> bool:
        """Return whether adapters of these ranks fit on the device together."""
        return True

    def pins_changed(self, versions: Sequence[Version]) -> None:
        """Receive the versions that are to stay on the device, whenever they change."""

    def content_unused(self, content: AdapterId) -> None:
        """Receive content that nothing here refers to any more, before its bytes are deleted. Must be quick."""
