"""EngineStats: what the engine holds and has done so far, for metrics, health checks and tests."""

from dataclasses import dataclass

from adapters.format.spec import AdapterId
from server.engine.sequence import Batch


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot taken between steps. Counters start at 0 with the engine."""

    waiting: int = 0
    running: int = 0
    blocks_used: int = 0
    blocks_total: int = 0
    prompt_tokens: int = 0
    """Prompt tokens computed, including those computed again after a preemption."""
    cached_tokens: int = 0
    """Prompt tokens taken from the prefix cache."""
    output_tokens: int = 0
    drafted_tokens: int = 0
    """Tokens drafted by speculation."""
    accepted_tokens: int = 0
    """Of those, the ones that were sampled, too."""
    steps: int = 0
    failed_steps: int = 0
    preemptions: int = 0
    adapter_loads: int = 0
    """Adapters copied to the device."""
    adapter_evictions: int = 0
    device_adapters: frozenset[AdapterId] = frozenset()
    pinned_adapters: frozenset[AdapterId] = frozenset()
    """Adapters that are to stay on the device, whether they are loaded yet or not."""
    host_adapters: frozenset[AdapterId] = frozenset()
    running_adapters: frozenset[AdapterId] = frozenset()
    waiting_adapters: frozenset[AdapterId] = frozenset()
    healthy: bool = True


@dataclass(slots=True)
class StepCounters:
    """What the engine counts from its start, one field for each counter of :class:`EngineStats`."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    steps: int = 0
    failed_steps: int = 0
    adapter_loads: int = 0
    adapter_evictions: int = 0

    def count(self, batch: Batch) -> None:
        """Count a batch that has run, before its sampled tokens are appended."""
        self.steps += 1
        for chunk in batch.chunks:
            sequence = chunk.sequence
            self.prompt_tokens += max(0, min(chunk.end, sequence.prompt_length) - chunk.start)
            first = chunk.start == sequence.cached and not sequence.preemptions
            if first and not sequence.output_length:
                self.cached_tokens += sequence.cached
