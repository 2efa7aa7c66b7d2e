"""What the server tells Prometheus: gauges of the engine at the moment of asking, and what requests were like."""

from collections.abc import Callable, Iterable, Iterator
from time import time

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from adapters.registry import Adapter
from adapters.spec import AdapterId
from server.engine import EngineStats

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_SLOW = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

_GAUGES: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "manylora_requests_waiting": ("Requests in the queue", lambda s: s.waiting),
    "manylora_requests_running": ("Requests in the batch", lambda s: s.running),
    "manylora_kv_blocks_used": ("KV blocks that live requests hold", lambda s: s.blocks_used),
    "manylora_kv_blocks": ("KV blocks in all", lambda s: s.blocks_total),
    "manylora_device_adapters": ("Adapters on the device", lambda s: len(s.device)),
    "manylora_host_adapters": ("Adapters in host memory", lambda s: len(s.host)),
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

    def __init__(
        self, base: str, max_adapters: int, stats: Callable[[], EngineStats], adapters: Callable[[], Iterable[Adapter]]
    ) -> None:
        self._registry = registry = CollectorRegistry()
        registry.register(_EngineFigures(base, max_adapters, stats, adapters))
        self._requests = Counter(
            "manylora_http_requests", "HTTP requests by status; 499: the client left", ["status"], registry=registry
        )
        self._prompt_tokens = Counter("manylora_prompt_tokens", "Prompt tokens of ended requests", registry=registry)
        self._output_tokens = Counter("manylora_output_tokens", "Answer tokens of ended requests", registry=registry)
        self._first = Histogram("manylora_time_to_first_token_seconds", "From submit", buckets=_SLOW, registry=registry)
        self._next = Histogram(
            "manylora_time_between_tokens_seconds", "Of one request", buckets=_FAST, registry=registry
        )
        self._whole = Histogram(
            "manylora_request_seconds", "From submit to the end of the answer", buckets=_SLOW, registry=registry
        )

    def responded(self, status: int) -> None:
        """One HTTP request is answered."""
        self._requests.labels(str(status)).inc()

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
        return generate_latest(self._registry)


class _EngineFigures(Collector):
    """The engine's snapshot when it is asked for."""

    def __init__(
        self, base: str, max_adapters: int, stats: Callable[[], EngineStats], adapters: Callable[[], Iterable[Adapter]]
    ) -> None:
        self._base = base
        self._max_adapters = max_adapters
        self._stats = stats
        self._adapters = adapters

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
        adapters = list(self._adapters())
        resident = _names(adapters, stats.device | stats.running_adapters)
        family.add_metric([str(self._max_adapters), resident, _names(adapters, stats.waiting_adapters)], time())
        return family


def _names(adapters: Iterable[Adapter], contents: frozenset[AdapterId]) -> str:
    return ",".join(adapter.name for adapter in adapters if adapter.spec.id in contents)
