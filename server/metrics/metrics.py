"""Metrics: what a server records as it works, and the page for Prometheus."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import cast

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from adapters.registry.registry import Registry
from server.access.limits import LimitName
from server.access.visible_metrics import VisibleMetrics
from server.engine.sequence import Timing
from server.engine.stats import EngineStats
from server.metrics.adapters import AdapterCollector
from server.metrics.aliases import AliasCollector
from server.metrics.build import Build, BuildCollector
from server.metrics.engine import EngineCollector
from server.metrics.gateway import GatewayCollector
from server.metrics.http import OTHER, HttpCollector
from server.metrics.key_limits import KeyLimitCollector
from server.metrics.registry import RegistrationOutcome, RegistryCollector
from server.metrics.requests import EndedRequest, RequestCollector

OPENMETRICS = "application/openmetrics-text"


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of the server that metrics tell, or keep."""

    slots: int
    """Adapters that the device holds at most."""
    host_cache_bytes: int
    adapters: int
    """Adapters with series of their own; also pairs of an alias and a version."""


class Metrics:
    """The metrics of one server, in a registry of their own. Recorded on the event loop only."""

    def __init__(
        self,
        build: Build,
        limits: Limits,
        stats: Callable[[], EngineStats],
        registry: Registry,
        refused: Mapping[LimitName, int],
    ) -> None:
        """``refused``: requests that each limit of keys has refused so far."""
        self._base = build.base
        self._prometheus = CollectorRegistry()
        self._http = HttpCollector()
        self._requests = RequestCollector()
        self._adapters = AdapterCollector(build.base, registry, limits.adapters)
        self._aliases = AliasCollector(registry, limits.adapters)
        self._registry = RegistryCollector(registry)
        for collector in (
            self._http,
            self._requests,
            self._adapters,
            self._aliases,
            EngineCollector(stats, limits.slots, limits.host_cache_bytes),
            self._registry,
            BuildCollector(build),
            GatewayCollector(build.base, limits.slots, stats, registry),
            KeyLimitCollector(refused),
        ):
            self.add(collector)
        ProcessCollector(registry=self._prometheus)

    def add(self, collector: Collector) -> None:
        """Show what ``collector`` has, too."""
        self._prometheus.register(collector)

    def responded(self, method: str, route: str | None, status: int, adapters: Collection[str] | None = None) -> None:
        """Count an HTTP response. ``route``: the template of its path, None if no route took the request.

        ``adapters``: names of those that took part in the answer; None if it is not one of the model.
        """
        self._http.responded(method, route, status)
        if adapters is not None:
            self._adapters.responded(adapters, route or OTHER, status)

    def registered(self, outcome: RegistrationOutcome) -> None:
        """Count a registration over HTTP."""
        self._registry.registered(outcome)

    def waited(self, timing: Timing, *, adapted: bool, computed: bool = True) -> None:
        """Record how long a sequence waited, and how long its prompt took, if that was ``computed``.

        ``adapted``: whether it has adapters.
        """
        self._requests.waited(timing, adapted=adapted, computed=computed)

    def first_token(
        self, seconds: float, adapters: Collection[str] = (), aliases: Collection[tuple[str, str]] = ()
    ) -> None:
        """Record the first token of a request, ``seconds`` after it was submitted.

        ``adapters`` and ``aliases`` are as in :class:`~server.metrics.requests.EndedRequest`.
        """
        self._requests.first_token(seconds)
        self._adapters.first_token(adapters, seconds)
        for alias, version in aliases:
            self._aliases.first_token(alias, version, seconds)

    def next_tokens(self, seconds: float, count: int) -> None:
        """Record ``count`` more tokens of a sequence, ``seconds`` after the last one."""
        self._requests.between_tokens.add(seconds / count, count)

    def ended(self, request: EndedRequest) -> None:
        """Record a request that has ended."""
        self._requests.ended(request)
        self._adapters.ended(request)
        for alias, version in request.aliases:
            self._aliases.ended(alias, version, request)

    def render(self, accept: str = "", sees: Callable[[str], bool] | None = None) -> tuple[bytes, str]:
        """Return all metrics, in the format that ``accept``, a header, asks for, and its content type.

        With ``sees``, only those that name no adapter for which it returns False.
        """
        self._aliases.update()
        self._adapters.update()
        source = self._prometheus
        if sees is not None:
            visible = VisibleMetrics(source, lambda name: name == self._base or sees(name))
            source = cast("CollectorRegistry", visible)  # only its collect() is called
        if any(kind.partition(";")[0].strip() == OPENMETRICS for kind in accept.split(",")):
            # By default it writes vllm_ for vllm: in samples. All our names are legal without any escaping.
            return openmetrics.generate_latest(source, openmetrics.ALLOWUTF8), openmetrics.CONTENT_TYPE_LATEST
        return generate_latest(source), CONTENT_TYPE_PLAIN_0_0_4
