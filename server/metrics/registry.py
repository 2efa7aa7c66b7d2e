"""Metrics of the registry of adapters."""

from collections import Counter
from collections.abc import Iterator
from typing import Literal

from prometheus_client.core import Metric

from adapters.registry.registry import Registry
from server.metrics.families import Labels, Scraped, counters, gauge

RegistrationOutcome = Literal["accepted", "same", "refused", "failed"]
"""How a registration ended. same: the name has this content already; failed: through a fault of the server."""


class RegistryCollector(Scraped):
    """What is registered, and how registrations over HTTP ended. Recorded on the event loop only."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._registrations: Counter[Labels] = Counter()

    def registered(self, outcome: RegistrationOutcome) -> None:
        """Count a registration over HTTP."""
        self._registrations[(outcome,)] += 1

    def collect(self) -> Iterator[Metric]:
        usage = self._registry.usage()
        yield gauge("manylora_adapters", "Registered adapters", usage.adapters)
        yield gauge("manylora_adapter_versions", "Versions of registered adapters", usage.versions)
        yield gauge("manylora_store_bytes", "Bytes of stored adapters", usage.bytes)
        if usage.quota_bytes is not None:
            yield gauge("manylora_store_quota_bytes", "Most bytes of stored adapters", usage.quota_bytes)
        yield gauge(
            "manylora_registry_available",
            "1, or 0 while the database cannot be reached",
            self._registry.available,
        )
        yield counters(
            "manylora_registrations", "Registrations over HTTP, by outcome", ["outcome"], self._registrations
        )
