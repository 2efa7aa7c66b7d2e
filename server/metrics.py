"""What the server tells Prometheus: gauges of the engine at the moment of asking, and what requests were like."""

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

Outcome = Literal["ok", "error", "cancelled"]
"""How a request ended; cancelled: its client left."""
Intake = Literal["accepted", "same", "refused", "failed"]
"""How a registration ended; same: the name had this content already; failed: our doing, not the caller's."""

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_SLOW = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

_GAUGES: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "manylora_requests_waiting": ("Requests in the queue", lambda s: s.waiting),
    "manylora_requests_running": ("Requests in the batch", lambda s: s.running),
    "manylora_kv_blocks_used": ("KV blocks that live requests hold", lambda s: s.blocks_used),
    "manylora_kv_blocks": ("KV blocks in all", lambda s: s.blocks_total),
    "manylora_device_adapters": ("Adapters on the device", lambda s: len(s.device_adapters)),
    "manylora_host_adapters": ("Adapters in host memory", lambda s: len(s.host_adapters)),
    "manylora_healthy": ("1, or 0 after several failed steps in a row", lambda s: s.healthy),
}
_COUNTERS: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "manylora_engine_steps": ("Forward passes", lambda s: s.steps),
    "manylora_engine_failed_steps": ("Forward passes that failed", lambda s: s.failed_steps),
    "manylora_computed_prompt_tokens": ("Prompt tokens computed, after preemption again", lambda s: s.prompt_tokens),
    "manylora_cached_prompt_tokens": ("Prompt tokens from the prefix cache", lambda s: s.cached_tokens),
    "manylora_sampled_tokens": ("Tokens sampled", lambda s: s.output_tokens),
    "manylora_preemptions": ("Requests set back for lack of KV blocks", lambda s: s.preemptions),
    "manylora_adapter_loads": ("Adapters copied to the device", lambda s: s.adapter_loads),
    "manylora_adapter_evictions": ("Adapters that made room on the device", lambda s: s.adapter_evictions),
}
_GATEWAY: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "vllm:num_requests_waiting": ("Requests in the queue", lambda s: s.waiting),
    "vllm:num_requests_running": ("Requests in the batch", lambda s: s.running),
    "vllm:kv_cache_usage_perc": ("Share of KV blocks in use, 0 to 1", lambda s: s.blocks_used / max(s.blocks_total, 1)),
}
"""Under the names that inference gateways for Kubernetes read."""


class Metrics:
    """One server's figures, in a registry of their own. Labels are bounded: nothing is counted per adapter."""

    def __init__(self, base: str, max_adapters: int, stats: Callable[[], EngineStats], registry: Registry) -> None:
        self._registry = figures = CollectorRegistry()
        figures.register(_EngineFigures(base, max_adapters, stats, registry))
        figures.register(_RegistryFigures(registry))
        self.aliases = AliasMetrics(registry, figures)
        self._requests = Counter(
            "manylora_http_requests", "HTTP requests by status; 499: the client left", ["status"], registry=figures
        )
        self._registrations = Counter("manylora_registrations", "Over HTTP, by outcome", ["outcome"], registry=figures)
        self._prompt_tokens = Counter("manylora_prompt_tokens", "Prompt tokens of ended requests", registry=figures)
        self._output_tokens = Counter("manylora_output_tokens", "Answer tokens of ended requests", registry=figures)
        self._first = Histogram("manylora_time_to_first_token_seconds", "From submit", buckets=_SLOW, registry=figures)
        self._next = Histogram(
            "manylora_time_between_tokens_seconds", "Of one request", buckets=_FAST, registry=figures
        )
        self._whole = Histogram(
            "manylora_request_seconds", "From submit to the end of the answer", buckets=_SLOW, registry=figures
        )

    def responded(self, status: int) -> None:
        """One HTTP request is answered."""
        self._requests.labels(str(status)).inc()

    def registered(self, outcome: Intake) -> None:
        """A registration has ended."""
        self._registrations.labels(outcome).inc()

    def first_token(self, seconds: float) -> None:
        """A request's first token came, so long after it was submitted."""
        self._first.observe(seconds)

    def next_tokens(self, seconds: float, count: int) -> None:
        """``count`` more tokens came, so long after the last."""
        for _ in range(count):
            self._next.observe(seconds / count)

    def ended(self, prompt_tokens: int, output_tokens: int, seconds: float) -> None:
        """A request has left the engine, whole or not."""
        self._prompt_tokens.inc(prompt_tokens)
        self._output_tokens.inc(output_tokens)
        self._whole.observe(seconds)

    def render(self) -> bytes:
        """Everything in Prometheus' text format."""
        self.aliases.prune()
        return generate_latest(self._registry)


class AliasMetrics:
    """Requests by alias and by the version that it meant, so that the versions of a canary can be compared.

    A pair has figures for as long as the alias may mean the version; their number is bounded by the aliases' targets.
    Used on the event loop only.
    """

    def __init__(self, registry: Registry, figures: CollectorRegistry) -> None:
        self._registry = registry
        labels = ["alias", "version"]
        self._requests = Counter(
            "manylora_alias_requests", "Requests that have ended", [*labels, "outcome"], registry=figures
        )
        self._tokens = Counter("manylora_alias_output_tokens", "Answer tokens", labels, registry=figures)
        self._first = Histogram(
            "manylora_alias_time_to_first_token_seconds", "From submit", labels, buckets=_SLOW, registry=figures
        )
        self._whole = Histogram(
            "manylora_alias_request_seconds", "From submit to the end", labels, buckets=_SLOW, registry=figures
        )
        self._pairs: set[tuple[str, str]] = set()

    def first_token(self, alias: str, version: str, seconds: float) -> None:
        """The first token came, so long after the request was submitted."""
        self._note(alias, version)
        self._first.labels(alias, version).observe(seconds)

    def ended(self, alias: str, version: str, outcome: Outcome, output_tokens: int, seconds: float) -> None:
        """A request has left the engine."""
        self._note(alias, version)
        self._requests.labels(alias, version, outcome).inc()
        self._tokens.labels(alias, version).inc(output_tokens)
        self._whole.labels(alias, version).observe(seconds)

    def prune(self) -> None:
        """Drop the figures of aliases and targets that are gone."""
        for alias, version in [pair for pair in self._pairs if not self._lives(*pair)]:
            self._pairs.discard((alias, version))
            for figure in (self._requests, self._tokens, self._first, self._whole):
                figure.remove_by_labels({"alias": alias, "version": version})

    def _note(self, alias: str, version: str) -> None:
        if (alias, version) not in self._pairs:
            self.prune()
            self._pairs.add((alias, version))

    def _lives(self, alias: str, version: str) -> bool:
        """Whether the alias may mean the version, today or after a roll-back."""
        try:
            self._registry.version(version)
            targets = self._registry.alias(alias).targets
        except UnknownAdapter:
            return False
        meant = parse_reference(version)
        return any(t.adapter == meant.name and t.version in (None, meant.version) for t in targets)


class _RegistryFigures(Collector):
    """How much is registered when it is asked for."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def describe(self) -> Iterable[Metric]:
        """Nothing, as for :class:`_EngineFigures`."""
        return ()

    def collect(self) -> Iterator[Metric]:
        usage = self._registry.usage()
        yield GaugeMetricFamily("manylora_adapters", "Registered adapters", usage.adapters)
        yield GaugeMetricFamily("manylora_adapter_versions", "Their versions", usage.versions)
        yield GaugeMetricFamily("manylora_store_bytes", "Bytes of their content", usage.bytes)
        if usage.quota_bytes is not None:
            yield GaugeMetricFamily("manylora_store_quota_bytes", "Bytes they may have", usage.quota_bytes)
        yield GaugeMetricFamily(
            "manylora_registry_available", "1, or 0 while the database is away", float(self._registry.available)
        )


class _EngineFigures(Collector):
    """The engine's snapshot when it is asked for."""

    def __init__(self, base: str, max_adapters: int, stats: Callable[[], EngineStats], registry: Registry) -> None:
        self._base = base
        self._max_adapters = max_adapters
        self._stats = stats
        self._registry = registry

    def describe(self) -> Iterable[Metric]:
        """Nothing: the registry need not ask the engine to learn the names."""
        return ()

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, (about, value) in _GAUGES.items():
            yield GaugeMetricFamily(name, about, float(value(stats)))
        for name, (about, value) in _COUNTERS.items():
            yield CounterMetricFamily(name, about, float(value(stats)))
        for name, (about, value) in _GATEWAY.items():
            family = GaugeMetricFamily(name, about, labels=["model_name"])
            family.add_metric([self._base], float(value(stats)))
            yield family
        yield self._lora_info(stats)

    def _lora_info(self, stats: EngineStats) -> Metric:
        """Residents that are idle count as running: a gateway sends a request where its adapter is."""
        family = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters on the device and adapters waited for; the value is the time, in Unix seconds",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        resident = ",".join(self._registry.names_of(stats.device_adapters | stats.running_adapters))
        waiting = ",".join(self._registry.names_of(stats.waiting_adapters))
        family.add_metric([str(self._max_adapters), resident, waiting], time())
        return family
