"""EngineStats: what the engine holds and has done so far, for metrics, health checks and tests."""

from bisect import bisect_left
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import accumulate

from adapters.format.spec import AdapterId
from server.engine.sequence import Batch, Sequence

PHASES = ("load", "schedule", "forward", "sample", "commit")
"""Parts of a step, in their order."""
PHASE_BOUNDS = (0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
LOAD_BOUNDS = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


class Distribution:
    """A histogram of seconds. One thread adds to it; any may read it.

    A reader may see a count without its sum, as with prometheus_client's own. That one locks for each bucket, which is
    too slow for each token and each step.
    """

    __slots__ = ("_counts", "bounds", "sum")

    def __init__(self, bounds: Seq[float]) -> None:
        """``bounds``: the largest value of each bucket, ascending; one more bucket takes all larger values."""
        self.bounds = tuple(bounds)
        self.sum = 0.0
        self._counts = [0] * (len(bounds) + 1)

    def add(self, value: float, times: int = 1) -> None:
        """Count ``value``, ``times`` times."""
        self._counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    @property
    def cumulative(self) -> list[int]:
        """For each of ``bounds``, how many values were not larger; and how many there were in all."""
        return list(accumulate(list(self._counts)))


class StepTimes:
    """How long the phases of steps and the loads of adapters took."""

    def __init__(self) -> None:
        self.phases = {phase: Distribution(PHASE_BOUNDS) for phase in PHASES}
        self.cold = Distribution(LOAD_BOUNDS)
        """Loads of adapters that were read from disk or a shared store first."""
        self.warm = Distribution(LOAD_BOUNDS)
        """Loads from host memory."""

    def add(self, phase: str, seconds: float) -> None:
        """Take in a phase, one of :data:`PHASES`, of a step that has computed something."""
        self.phases[phase].add(seconds)

    def loaded(self, read: float | None, copy: float) -> None:
        """Take in a load: the seconds of reading the adapter, None if it was in host memory, and of copying it."""
        if read is None:
            self.warm.add(copy)
        else:
            self.cold.add(read + copy)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot taken between steps. Counters start at 0 with the engine."""

    waiting: int = 0
    running: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0
    """Blocks that the prefix cache can find, used or not."""
    blocks_total: int = 0
    prompt_tokens: int = 0
    """Prompt tokens computed, including those computed again after a preemption."""
    cached_tokens: int = 0
    """Prompt tokens taken from the prefix cache."""
    decode_rows: int = 0
    """Rows of steps that were not a prompt's: of answers and drafts."""
    output_tokens: int = 0
    drafted_tokens: int = 0
    """Tokens drafted by speculation."""
    accepted_tokens: int = 0
    """Of those, the ones that were sampled, too."""
    steps: int = 0
    failed_steps: int = 0
    """Steps that at least one of their sequences could not take part in."""
    out_of_memory: int = 0
    """Forward passes that failed for lack of memory, and were tried again with less."""
    overdue: int = 0
    """Sequences that ended because their deadline had passed, or could not be met."""
    preemptions: int = 0
    sequences: int = 0
    """Sequences that have begun."""
    prefix_hits: int = 0
    """Of those, the ones that took blocks from the prefix cache."""
    slot_hits: int = 0
    """Sequences with adapters that found all of them on the device."""
    slot_misses: int = 0
    """Sequences with adapters that waited for one."""
    adapter_loads: int = 0
    """Adapters copied to the device."""
    adapter_load_failures: int = 0
    adapter_evictions: int = 0
    host_hits: int = 0
    """Loads that found the adapter in host memory."""
    host_misses: int = 0
    """Reads from disk or a shared store that began."""
    host_evictions: int = 0
    host_bytes: int = 0
    device_adapters: frozenset[AdapterId] = frozenset()
    pinned_adapters: frozenset[AdapterId] = frozenset()
    """Adapters that are to stay on the device, whether they are loaded yet or not."""
    host_adapters: frozenset[AdapterId] = frozenset()
    running_adapters: frozenset[AdapterId] = frozenset()
    waiting_adapters: frozenset[AdapterId] = frozenset()
    waiting_tenants: int = 0
    """API keys of which a sequence waits; requests without one count as one."""
    healthy: bool = True
    times: StepTimes = field(default_factory=StepTimes)
    """Shared by all snapshots of an engine, which goes on adding to it."""


@dataclass
class StepCounters:
    """What the engine counts from its start, one field for each counter of :class:`EngineStats`."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    decode_rows: int = 0
    output_tokens: int = 0
    steps: int = 0
    failed_steps: int = 0
    out_of_memory: int = 0
    overdue: int = 0
    sequences: int = 0
    prefix_hits: int = 0
    slot_hits: int = 0
    slot_misses: int = 0
    adapter_loads: int = 0
    adapter_load_failures: int = 0
    adapter_evictions: int = 0
    host_hits: int = 0

    def count(self, batch: Batch) -> None:
        """Count a batch that has run, before its sampled tokens are appended."""
        self.steps += 1
        for chunk in batch.chunks:
            sequence = chunk.sequence
            of_prompt = max(0, min(chunk.end, sequence.prompt_length) - chunk.start)
            self.prompt_tokens += of_prompt
            self.decode_rows += chunk.length - of_prompt
            first = chunk.start == sequence.cached and not sequence.preemptions
            if first and not sequence.output_length and not sequence.probe:
                self._count_first(chunk.sequence)

    def _count_first(self, sequence: Sequence) -> None:
        """Count the first step of a sequence."""
        self.sequences += 1
        self.cached_tokens += sequence.cached
        self.prefix_hits += sequence.cached > 0
        if sequence.adaptation:
            self.slot_misses += sequence.loading > 0
            self.slot_hits += not sequence.loading
