"""Metrics under vLLM's names, which inference gateways and autoscalers for Kubernetes read."""

from collections.abc import Iterator
from time import time

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from adapters.registry.registry import Registry
from server.engine.stats import EngineStats
from server.metrics.engine import Stats, Table
from server.metrics.families import Scraped

_GAUGES: Table = {
    "vllm:num_requests_waiting": ("Sequences in the queue", lambda s: s.waiting),
    "vllm:num_requests_running": ("Sequences in the batch", lambda s: s.running),
    "vllm:kv_cache_usage_perc": ("Share of KV blocks in use, 0 to 1", lambda s: s.blocks_used / max(s.blocks_total, 1)),
}
_COUNTERS: Table = {
    "vllm:spec_decode_num_draft_tokens": ("Tokens drafted by speculation", lambda s: s.drafted_tokens),
    "vllm:spec_decode_num_accepted_tokens": ("Drafted tokens that were accepted", lambda s: s.accepted_tokens),
}


class GatewayCollector(Scraped):
    """What gateways route by: queue, batch, KV use, and which adapters are on the device."""

    def __init__(self, base: str, slots: int, stats: Stats, registry: Registry) -> None:
        """``slots``: adapters that the device holds at most."""
        self._base = base
        self._slots = slots
        self._stats = stats
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, (meaning, value) in _GAUGES.items():
            gauge = GaugeMetricFamily(name, meaning, labels=["model_name"])
            gauge.add_metric([self._base], float(value(stats)))
            yield gauge
        for name, (meaning, value) in _COUNTERS.items():
            counter = CounterMetricFamily(name, meaning, labels=["model_name"])
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
        family.add_metric([str(self._slots), resident, waiting], time())
        return family
