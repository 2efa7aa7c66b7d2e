"""Residency: which adapters are in host memory and on the device, and how they get there.

An adapter goes from disk to host memory on the loader's threads, and from there to pages of the device on the engine's.
"""

import logging
import time
from collections.abc import Callable

from adapters.errors import AdapterError, RegistryUnavailable, StoreFull
from adapters.format.spec import AdapterId
from server.compute.pool import PackedAdapter
from server.engine.loader import Loader
from server.engine.resilience.out_of_memory import is_out_of_memory
from server.engine.resilience.step_runner import fail
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler
from server.engine.sequence import Failed
from server.engine.slots import Placement
from server.engine.stats import StepCounters, StepTimes

log = logging.getLogger(__name__)

COPIES_PER_STEP = 2
"""Adapters copied to the device per step while sequences run: more would delay their next tokens."""
MAX_PREFETCH = 8
"""Adapters of waiting sequences that are loaded to host memory before it is their turn."""


class Residency:
    """Loads the adapters that the scheduler misses, and removes those that were deleted. For the engine's thread."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        loader: Loader,
        counters: StepCounters,
        times: StepTimes,
        *,
        wake_up: Callable[[], None],
    ) -> None:
        """``wake_up`` ends an idle engine's wait for a message."""
        self._runner = runner
        self._scheduler = scheduler
        self._slots = scheduler.slots
        self._loader = loader
        self._counters = counters
        self._times = times
        self._wake_up = wake_up
        self._to_remove: set[AdapterId] = set()
        self._loads_again: set[AdapterId] = set()
        """Adapters that are being loaded once more, after memory was short for them."""

    def advance(self, now: float) -> list[Failed]:
        """Move missing adapters one stage on. Fails the sequences whose adapters cannot be loaded.

        ``now`` is ``time.monotonic()``.
        """
        events = self._load(now)
        events += self.fail_copies()
        self._slots.copying = frozenset(a for a in self._slots.resident if not self._runner.is_ready(a))
        return events

    def remove(self, adapter: AdapterId) -> None:
        """Remove an adapter from everywhere, as soon as no sequence uses it: see :meth:`remove_unused`."""
        self._to_remove.add(adapter)

    def remove_unused(self) -> None:
        """Remove the adapters that were to be removed and are neither used nor pinned."""
        for adapter in [a for a in self._to_remove if not self._slots.leases(a) and a not in self._slots.pinned]:
            self._to_remove.discard(adapter)
            self._loads_again.discard(adapter)
            self._loader.drop(adapter)
            if adapter in self._slots:
                self._evict(adapter)

    def release_memory(self, keep: AdapterId | None = None) -> None:
        """Free what can be freed without losing a request: adapters in host memory, and what allocators keep."""
        dropped = self._loader.drop_all(but=keep)
        self._runner.backend.release_memory()
        log.warning("Memory is short: dropped %d adapters from host memory", dropped)

    def fail_copies(self) -> list[Failed]:
        """Fail the sequences of adapters whose copy to the device has failed."""
        events: list[Failed] = []
        for adapter, error in self._runner.failed_copies().items():
            affected = [s for s in self._scheduler.running if any(a.id == adapter for a in s.adaptation)]
            events += fail(self._scheduler, affected, "The adapter could not be loaded.")
            self._evict(adapter)
            events += self._fail_adapter(adapter, error)
        return events

    def check(self) -> None:
        """Assert that the slots and the runner agree on what is on the device, and where."""
        assert set(self._slots.resident) == set(self._runner.resident)
        for adapter in self._slots.resident:
            assert self._slots.pages_of(adapter) == self._runner.resident[adapter].pages

    def _load(self, now: float) -> list[Failed]:
        events: list[Failed] = []
        for adapter, error in self._loader.collect().items():
            if not self._load_again(adapter, error):
                events += self._fail_adapter(adapter, error)
        budget = COPIES_PER_STEP if self._scheduler.running else self._slots.slots
        most_ahead, ahead = min(MAX_PREFETCH, self._loader.max_prefetch), set[AdapterId]()
        in_order = True
        for wanted in self._scheduler.admission.missing_adapters(now):
            id_, sequence = wanted.adapter.id, wanted.sequence
            packed = self._loader.get(id_)
            if packed is not None and budget and (in_order or wanted.late):
                placement = self._slots.place(id_, packed.rank, wanted.keep, now)
                if placement is not None:
                    budget -= 1
                    if failure := self._place(id_, packed, placement):
                        return events + self._fail_adapter(id_, failure)
                    continue
                if sequence and (fit_error := self._slots.fit_error(sequence.adaptation)):
                    # Others were pinned after it was queued.
                    return events + fail(self._scheduler, [sequence], fit_error)
                in_order = in_order and sequence is None  # a pin waits without holding up waiting sequences
                budget = 0 if wanted.late else budget  # who is late gets the next space
            if packed is None or sequence:
                ahead.add(id_)
            if len(ahead) > most_ahead:
                break
            if packed is None:
                self._loader.request(id_)
        return events

    def _load_again(self, adapter: AdapterId, error: BaseException) -> bool:
        """Load an adapter once more, if memory was short for it, now that others have left host memory."""
        if not is_out_of_memory(error) or adapter in self._loads_again:
            self._loads_again.discard(adapter)
            return False
        self._loads_again.add(adapter)
        self.release_memory()
        self._loader.request(adapter)
        return True

    def _place(self, adapter: AdapterId, packed: PackedAdapter, placement: Placement) -> Exception | None:
        """Copy an adapter to the device. Returns the error, if there is one."""
        for evicted in placement.evicted:
            self._runner.evict(evicted)
        self._counters.adapter_evictions += len(placement.evicted)
        started, read = time.perf_counter(), self._loader.read_seconds(adapter)
        try:
            self._copy(adapter, packed, placement.pages)
        except Exception as error:  # usually out of device memory; the next user of the pages overwrites them
            self._slots.evict(adapter)
            self._wake_up()  # other adapters may be missing, and an idle engine would wait for a message
            return error
        self._loads_again.discard(adapter)
        self._counters.adapter_loads += 1
        self._counters.host_hits += read is None
        self._times.loaded(read, time.perf_counter() - started)
        return None

    def _copy(self, adapter: AdapterId, packed: PackedAdapter, pages: tuple[int, ...]) -> None:
        """Copy an adapter to its pages; if there is too little memory, once more with no other in host memory."""
        try:
            self._runner.place(adapter, pages, packed)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.release_memory(adapter)
            self._runner.place(adapter, pages, packed)

    def _evict(self, adapter: AdapterId) -> None:
        self._slots.evict(adapter)
        self._runner.evict(adapter)

    def _fail_adapter(self, adapter: AdapterId, error: BaseException) -> list[Failed]:
        affected = [s for s in self._scheduler.waiting if any(a.id == adapter for a in s.adaptation)]
        if self._scheduler.admission.pins_to_load.pop(adapter, None) or affected:
            # If nothing needs it any more, it may just have been deleted: not worth a log line.
            self._counters.adapter_load_failures += 1
            log.error("Adapter %s could not be loaded: %s", adapter, error)
        if is_out_of_memory(error):
            message = "There is not enough memory to load the adapter; try again later."
            return fail(self._scheduler, affected, message, "memory")
        at_fault = isinstance(error, AdapterError) and not isinstance(error, StoreFull | RegistryUnavailable)
        return fail(self._scheduler, affected, "The adapter could not be loaded.", "adapter" if at_fault else "engine")
