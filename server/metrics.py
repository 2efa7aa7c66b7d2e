"""Metrics for Prometheus: of HTTP requests, generation, registrations, the engine and the registry."""

from collections.abc import Callable, Iterable, Iterator
from time import time
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from adapters.errors import UnknownAdapter
from adapters.registry.names import parse_reference
from adapters.registry.registry import Registry
from server.engine.stats import EngineStats

RequestOutcome = Literal["ok", "error", "cancelled"]
"""How a request ended. cancelled: the client disconnected."""
RegistrationOutcome = Literal["accepted", "same", "refused", "failed"]
"""How a registration ended. same: the name has this content already; failed: through a fault of the server."""

_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_REQUEST_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

_GAUGES: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "manylora_requests_waiting": ("Requests in the queue", lambda s: s.waiting),
    "manylora_requests_running": ("Requests in the batch", lambda s: s.running),
    "manylora_kv_blocks_used": ("KV blocks in use", lambda s: s.blocks_used),
    "manylora_kv_blocks": ("KV blocks in all", lambda s: s.blocks_total),
    "manylora_device_adapters": ("Adapters on the device", lambda s: len(s.device_adapters)),
    "manylora_host_adapters": ("Adapters in host memory", lambda s: len(s.host_adapters)),
    "manylora_healthy": ("1, or 0 after several failed steps in a row", lambda s: s.healthy),
}
_COUNTERS: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "manylora_engine_steps": ("Forward passes", lambda s: s.steps),
    "manylora_engine_failed_steps": ("Forward passes that failed", lambda s: s.failed_steps),
    "manylora_computed_prompt_tokens": ("Prompt tokens computed, again after a preemption", lambda s: s.prompt_tokens),
    "manylora_cached_prompt_tokens": ("Prompt tokens from the prefix cache", lambda s: s.cached_tokens),
    "manylora_sampled_tokens": ("Tokens sampled", lambda s: s.output_tokens),
    "manylora_drafted_tokens": ("Tokens drafted by speculation", lambda s: s.drafted_tokens),
    "manylora_accepted_tokens": ("Drafted tokens that were accepted", lambda s: s.accepted_tokens),
    "manylora_preemptions": ("Requests preempted for lack of KV blocks", lambda s: s.preemptions),
    "manylora_adapter_loads": ("Adapters copied to the device", lambda s: s.adapter_loads),
    "manylora_adapter_evictions": ("Adapters evicted from the device", lambda s: s.adapter_evictions),
}
_VLLM_GAUGES: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "vllm:num_requests_waiting": ("Requests in the queue", lambda s: s.waiting),
    "vllm:num_requests_running": ("Requests in the batch", lambda s: s.running),
    "vllm:kv_cache_usage_perc": ("Share of KV blocks in use, 0 to 1", lambda s: s.blocks_used / max(s.blocks_total, 1)),
}
"""Gauges under vLLM's names, which inference gateways for Kubernetes read."""
_VLLM_COUNTERS: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "vllm:spec_decode_num_draft_tokens": ("Tokens drafted by speculation", lambda s: s.drafted_tokens),
    "vllm:spec_decode_num_accepted_tokens": ("Drafted tokens that were accepted", lambda s: s.accepted_tokens),
}
"""Counters under vLLM's names, which its dashboards read."""


class Metrics:
    """The metrics of one server, in a registry of their own. Labels are bounded: nothing is counted per adapter."""

    def __init__(self, base: str, max_adapters: int, stats: Callable[[], EngineStats], registry: Registry) -> None:
        self._registry = prometheus = CollectorRegistry()
        prometheus.register(_EngineCollector(base, max_adapters, stats, registry))
        prometheus.register(_RegistryCollector(registry))
        self.aliases = AliasMetrics(registry, prometheus)
        self._requests = Counter(
            "manylora_http_requests",
            "HTTP requests by status; 499: the client disconnected",
            ["status"],
            registry=prometheus,
        )
        self._registrations = Counter(
            "manylora_registrations", "Registrations over HTTP, by outcome", ["outcome"], registry=prometheus
        )
        self._prompt_tokens = Counter("manylora_prompt_tokens", "Prompt tokens of ended requests", registry=prometheus)
        self._output_tokens = Counter("manylora_output_tokens", "Answer tokens of ended requests", registry=prometheus)
        self._time_to_first_token = Histogram(
            "manylora_time_to_first_token_seconds", "From submission", buckets=_REQUEST_BUCKETS, registry=prometheus
        )
        self._time_between_tokens = Histogram(
            "manylora_time_between_tokens_seconds",
            "Between two tokens of a request",
            buckets=_TOKEN_BUCKETS,
            registry=prometheus,
        )
        self._request_seconds = Histogram(
            "manylora_request_seconds",
            "From submission to the end of the answer",
            buckets=_REQUEST_BUCKETS,
            registry=prometheus,
        )

    def responded(self, status: int) -> None:
        """Count an HTTP response."""
        self._requests.labels(str(status)).inc()

    def registered(self, outcome: RegistrationOutcome) -> None:
        """Count a registration over HTTP."""
        self._registrations.labels(outcome).inc()

    def first_token(self, seconds: float, aliases: Iterable[tuple[str, str]]) -> None:
        """Record the first token of a request, ``seconds`` after it was submitted.

        ``aliases``: those that the request used, and the version that each was resolved to.
        """
        self._time_to_first_token.observe(seconds)
        for alias, version in aliases:
            self.aliases.first_token(alias, version, seconds)

    def next_tokens(self, seconds: float, count: int) -> None:
        """Record ``count`` more tokens of a request, ``seconds`` after the last one."""
        for _ in range(count):
            self._time_between_tokens.observe(seconds / count)

    def ended(
        self,
        prompt_tokens: int,
        output_tokens: int,
        seconds: float,
        outcome: RequestOutcome,
        aliases: Iterable[tuple[str, str]],
    ) -> None:
        """Record a request that has ended. ``aliases`` is as in :meth:`first_token`."""
        self._prompt_tokens.inc(prompt_tokens)
        self._output_tokens.inc(output_tokens)
        self._request_seconds.observe(seconds)
        for alias, version in aliases:
            self.aliases.ended(alias, version, outcome, output_tokens, seconds)

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        self.aliases.prune()
        return generate_latest(self._registry)


class AliasMetrics:
    """Metrics by alias and by the version that was chosen for it, to compare the versions of a canary.

    A pair is kept as long as the version is a target of the alias, so the targets of all aliases bound their number.
    For the event loop only.
    """

    def __init__(self, registry: Registry, prometheus: CollectorRegistry) -> None:
        self._registry = registry
        labels = ["alias", "version"]
        self._requests = Counter(
            "manylora_alias_requests", "Requests that have ended", [*labels, "outcome"], registry=prometheus
        )
        self._tokens = Counter("manylora_alias_output_tokens", "Answer tokens", labels, registry=prometheus)
        self._time_to_first_token = Histogram(
            "manylora_alias_time_to_first_token_seconds",
            "From submission",
            labels,
            buckets=_REQUEST_BUCKETS,
            registry=prometheus,
        )
        self._request_seconds = Histogram(
            "manylora_alias_request_seconds",
            "From submission to the end of the answer",
            labels,
            buckets=_REQUEST_BUCKETS,
            registry=prometheus,
        )
        self._tracked: set[tuple[str, str]] = set()

    def first_token(self, alias: str, version: str, seconds: float) -> None:
        """Record the first token of a request, ``seconds`` after it was submitted."""
        self._track(alias, version)
        self._time_to_first_token.labels(alias, version).observe(seconds)

    def ended(self, alias: str, version: str, outcome: RequestOutcome, output_tokens: int, seconds: float) -> None:
        """Record a request that has ended."""
        self._track(alias, version)
        self._requests.labels(alias, version, outcome).inc()
        self._tokens.labels(alias, version).inc(output_tokens)
        self._request_seconds.labels(alias, version).observe(seconds)

    def prune(self) -> None:
        """Drop the metrics of aliases and targets that do not exist any more."""
        for alias, version in [pair for pair in self._tracked if not self._is_current(*pair)]:
            self._tracked.discard((alias, version))
            for metric in (self._requests, self._tokens, self._time_to_first_token, self._request_seconds):
                metric.remove_by_labels({"alias": alias, "version": version})

    def _track(self, alias: str, version: str) -> None:
        if (alias, version) not in self._tracked:
            self.prune()
            self._tracked.add((alias, version))

    def _is_current(self, alias: str, version: str) -> bool:
        """Whether the version is a target of the alias, or would be after a rollback."""
        try:
            self._registry.version(version)
            targets = self._registry.alias(alias).targets
        except UnknownAdapter:
            return False
        meant = parse_reference(version)
        return any(t.adapter == meant.name and t.version in (None, meant.version) for t in targets)


class _RegistryCollector(Collector):
    """Gauges of the registry, read when Prometheus scrapes."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def describe(self) -> Iterable[Metric]:
        """Return nothing, as :class:`_EngineCollector` does."""
        return ()

    def collect(self) -> Iterator[Metric]:
        usage = self._registry.usage()
        yield GaugeMetricFamily("manylora_adapters", "Registered adapters", usage.adapters)
        yield GaugeMetricFamily("manylora_adapter_versions", "Versions of registered adapters", usage.versions)
        yield GaugeMetricFamily("manylora_store_bytes", "Bytes of stored adapters", usage.bytes)
        if usage.quota_bytes is not None:
            yield GaugeMetricFamily("manylora_store_quota_bytes", "Most bytes of stored adapters", usage.quota_bytes)
        yield GaugeMetricFamily(
            "manylora_registry_available",
            "1, or 0 while the database cannot be reached",
            float(self._registry.available),
        )


class _EngineCollector(Collector):
    """Gauges and counters of the engine's last snapshot, read when Prometheus scrapes."""

    def __init__(self, base: str, max_adapters: int, stats: Callable[[], EngineStats], registry: Registry) -> None:
        self._base = base
        self._max_adapters = max_adapters
        self._stats = stats
        self._registry = registry

    def describe(self) -> Iterable[Metric]:
        """Return nothing, so that registering this collector does not read the stats."""
        return ()

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, (description, value) in _GAUGES.items():
            yield GaugeMetricFamily(name, description, float(value(stats)))
        for name, (description, value) in _COUNTERS.items():
            yield CounterMetricFamily(name, description, float(value(stats)))
        for name, (description, value) in _VLLM_GAUGES.items():
            family = GaugeMetricFamily(name, description, labels=["model_name"])
            family.add_metric([self._base], float(value(stats)))
            yield family
        for name, (description, value) in _VLLM_COUNTERS.items():
            counter = CounterMetricFamily(name, description, labels=["model_name"])
            counter.add_metric([self._base], float(value(stats)))
            yield counter
        yield self._lora_info(stats)

    def _lora_info(self, stats: EngineStats) -> Metric:
        """Return vLLM's LoRA gauge. Idle adapters on the device count as running: gateways route requests by them."""
        family = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters on the device, and adapters that requests wait for; the value is the Unix time in seconds",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        resident = ",".join(self._registry.names_of(stats.device_adapters | stats.running_adapters))
        waiting = ",".join(self._registry.names_of(stats.waiting_adapters))
        family.add_metric([str(self._max_adapters), resident, waiting], time())
        return family
