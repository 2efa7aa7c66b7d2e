"""Metrics of the engine's last snapshot: queue, steps, KV blocks, slots, host cache."""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import Metric

from server.engine.stats import EngineStats
from server.metrics.families import Labels, Scraped, counter, counters, gauge, histograms

Stats = Callable[[], EngineStats]
Table = Mapping[str, tuple[str, Callable[[EngineStats], float]]]
"""Name -> (meaning, value)."""

_GAUGES: Table = {
    "manylora_requests_waiting": ("Sequences in the queue", lambda s: s.waiting),
    "manylora_tenants_waiting": ("API keys of which a sequence is in the queue", lambda s: s.waiting_tenants),
    "manylora_requests_running": ("Sequences in the batch", lambda s: s.running),
    "manylora_healthy": ("1, or 0 after several failed steps in a row", lambda s: s.healthy),
    "manylora_kv_blocks": ("KV blocks in all", lambda s: s.blocks_total),
    "manylora_kv_blocks_used": ("KV blocks that sequences use", lambda s: s.blocks_used),
    "manylora_kv_blocks_cached": ("KV blocks that the prefix cache can find", lambda s: s.blocks_cached),
    "manylora_device_adapters": ("Adapters on the device", lambda s: len(s.device_adapters)),
    "manylora_pinned_adapters": ("Adapters that are to stay on the device", lambda s: len(s.pinned_adapters)),
    "manylora_host_adapters": ("Adapters in the host cache", lambda s: len(s.host_adapters)),
    "manylora_host_cache_bytes": ("Bytes of the host cache", lambda s: s.host_bytes),
}
_COUNTERS: Table = {
    "manylora_engine_steps": ("Forward passes", lambda s: s.steps),
    "manylora_engine_failed_steps": ("Steps that some sequence could not take part in", lambda s: s.failed_steps),
    "manylora_engine_out_of_memory": (
        "Forward passes that failed for lack of memory, and were tried again with less",
        lambda s: s.out_of_memory,
    ),
    "manylora_deadlines_exceeded": ("Sequences that ended unfinished because of their timeout", lambda s: s.overdue),
    "manylora_computed_prompt_tokens": ("Prompt tokens computed, again after a preemption", lambda s: s.prompt_tokens),
    "manylora_cached_prompt_tokens": ("Prompt tokens from the prefix cache", lambda s: s.cached_tokens),
    "manylora_sampled_tokens": ("Tokens sampled", lambda s: s.output_tokens),
    "manylora_drafted_tokens": ("Tokens drafted by speculation", lambda s: s.drafted_tokens),
    "manylora_accepted_tokens": ("Drafted tokens that were accepted", lambda s: s.accepted_tokens),
    "manylora_preemptions": ("Sequences preempted for lack of KV blocks", lambda s: s.preemptions),
    "manylora_prefix_cache_queries": ("Sequences that began", lambda s: s.sequences),
    "manylora_prefix_cache_hits": ("Sequences that took blocks from the prefix cache", lambda s: s.prefix_hits),
    "manylora_slot_hits": ("Sequences that found all their adapters on the device", lambda s: s.slot_hits),
    "manylora_slot_misses": ("Sequences that waited for an adapter", lambda s: s.slot_misses),
    "manylora_adapter_loads": ("Adapters copied to the device", lambda s: s.adapter_loads),
    "manylora_adapter_load_failures": (
        "Adapters that could not be read or copied",
        lambda s: s.adapter_load_failures,
    ),
    "manylora_adapter_evictions": ("Adapters evicted from the device", lambda s: s.adapter_evictions),
    "manylora_host_cache_hits": ("Loads that found the adapter in host memory", lambda s: s.host_hits),
    "manylora_host_cache_misses": ("Reads from disk or the shared store that began", lambda s: s.host_misses),
    "manylora_host_cache_evictions": ("Adapters evicted from the host cache", lambda s: s.host_evictions),
}


class EngineCollector(Scraped):
    """What the engine holds and has done."""

    def __init__(self, stats: Stats, slots: int, host_cache_bytes: int) -> None:
        """``slots``: adapters that the device holds at most. ``host_cache_bytes``: the host cache's capacity."""
        self._stats = stats
        self._slots = slots
        self._host_cache_bytes = host_cache_bytes

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, (meaning, value) in _GAUGES.items():
            yield gauge(name, meaning, value(stats))
        for name, (meaning, value) in _COUNTERS.items():
            yield counter(name, meaning, value(stats))
        yield gauge("manylora_device_slots", "Adapters that the device holds at most", self._slots)
        yield gauge("manylora_host_cache_capacity_bytes", "Capacity of the host cache", self._host_cache_bytes)
        rows: dict[Labels, float] = {("prefill",): stats.prompt_tokens, ("decode",): stats.decode_rows}
        yield counters("manylora_step_rows", "Rows of forward passes", ["kind"], rows)
        yield histograms(
            "manylora_step_phase_seconds",
            "Time of steps by phase",
            ["phase"],
            {(phase,): distribution for phase, distribution in stats.times.phases.items()},
        )
        yield histograms(
            "manylora_adapter_load_seconds",
            "Time of loads to the device; cold: the adapter was read from disk or the shared store",
            ["start"],
            {("cold",): stats.times.cold, ("warm",): stats.times.warm},
        )
