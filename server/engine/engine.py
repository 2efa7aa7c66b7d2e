"""Engine: the single owner of queues, blocks, slots and the device. Takes sequences and delivers events.

One thread runs ``step`` in a loop. All other threads only put messages into a queue or read the last snapshot of the
stats, so no locks are needed. Each step handles messages, loads adapters, schedules a batch, runs it and commits it.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, replace
from queue import Empty, SimpleQueue

import torch

from adapters.errors import AdapterError, RegistryUnavailable, StoreFull
from adapters.format.spec import AdapterId
from adapters.format.weights import AdapterWeights
from server.config import Settings
from server.engine.block_pool import BlockPool
from server.engine.commit import commit
from server.engine.loader import Loader
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler
from server.engine.sequence import Batch, Cause, Event, Failed, Sequence, Token, WeightedAdapter, is_last
from server.engine.slots import SlotTable, pages_for
from server.engine.speculation import Speculation
from server.engine.stats import EngineStats, StepCounters
from server.errors import EngineError, InvalidRequest, QueueFull

log = logging.getLogger(__name__)

COPIES_PER_STEP = 2
"""Adapters copied to the device per step while sequences run: more would delay their next tokens."""
MAX_PREFETCH = 8
"""Adapters of waiting sequences that are loaded to host memory before it is their turn."""
MAX_FAILED_STEPS = 3
"""Failed steps in a row after which the engine reports itself as unhealthy."""


@dataclass(frozen=True, slots=True)
class _Submit:
    sequence: Sequence


@dataclass(frozen=True, slots=True)
class _Abort:
    sequence_id: str


@dataclass(frozen=True, slots=True)
class _RemoveAdapter:
    adapter: AdapterId


@dataclass(frozen=True, slots=True)
class _SetPinned:
    adapters: tuple[WeightedAdapter, ...]


class _WakeUp:
    """Carries nothing: ends the engine's wait for a message, because an adapter was loaded or the engine stops."""


_Message = _Submit | _Abort | _RemoveAdapter | _SetPinned | _WakeUp


class Engine:
    """Serves sequences from one base.

    ``read_weights`` reads an adapter's weights, on worker threads. ``deliver`` gets each step's events.
    """

    def __init__(
        self,
        runner: Runner,
        settings: Settings,
        read_weights: Callable[[AdapterId], AdapterWeights],
        deliver: Callable[[list[Event]], None],
    ) -> None:
        self.runner = runner
        self.slots = SlotTable(settings.max_device_adapters, self.runner.pool.pages)
        self.scheduler = Scheduler(
            BlockPool(self.runner.blocks, settings.block_size),
            self.slots,
            max_sequences=settings.max_batch_sequences,
            max_tokens=settings.max_batch_tokens,
            max_wait=settings.max_wait_seconds,
            speculation=Speculation(active=settings.speculation == "auto" and runner.forward.batch_invariant),
        )
        self.loader = Loader(
            lambda adapter: self.runner.pool.pack(read_weights(adapter)),
            int(settings.host_cache_gib * 2**30),
            self._wake_up,
        )
        self._deliver = deliver
        self._max_unfinished = settings.max_queue + self.scheduler.max_sequences
        self._messages: SimpleQueue[_Message] = SimpleQueue()
        self._unfinished: set[str] = set()
        self._to_remove: set[AdapterId] = set()
        self._counters = StepCounters()
        self._failures_in_a_row = 0
        self._idle = True
        self._stopping = False
        self._dead = False
        self._threads = settings.cpu_threads
        self._thread: threading.Thread | None = None
        self._started = threading.Event()
        self._stats = EngineStats(blocks_total=self.runner.blocks)

    # For any thread

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence. Probes do not count towards ``max_queue``.

        Raises QueueFull, EngineError if the engine has stopped, and InvalidRequest if its adapters can never fit, or
        if it asks for nothing.
        """
        self._check_alive()
        if not (sequence.samples or sequence.pooling or sequence.scores is not None):
            raise InvalidRequest("max_tokens: 0 needs prompt_logprobs; give at least 1.", param="max_tokens")
        if fit_error := self.slots.fit_error(sequence.adaptation):
            raise InvalidRequest(fit_error, param="adapter")
        if not sequence.probe:
            if len(self._unfinished) >= self._max_unfinished:
                raise QueueFull("Too many requests are waiting; try again later.", code="queue_full")
            self._unfinished.add(sequence.id)
        self._messages.put(_Submit(sequence))
        self._check_alive()  # again: a message put after the engine has emptied its queue would never be read

    def _check_alive(self) -> None:
        if self._dead or self._stopping:
            raise EngineError("The engine has stopped.")

    def abort(self, sequence_id: str) -> None:
        """Drop a sequence before the next step. It gets no further event. Unknown ids are ignored."""
        self._messages.put(_Abort(sequence_id))

    def remove_adapter(self, adapter: AdapterId) -> None:
        """Drop an adapter, whose content is deleted, from the device and host memory once no sequence leases it."""
        self._messages.put(_RemoveAdapter(adapter))

    def pin(self, adapters: Collection[WeightedAdapter]) -> None:
        """Pin these adapters and unpin all others. Pinned adapters are loaded without a request and never evicted.

        If leased adapters leave no space for one for ``max_wait`` seconds, the least used adapters take no new
        sequences until it fits. An adapter that cannot be loaded is logged, and tried again when a sequence needs it
        or at the next call. Raises InvalidRequest if :meth:`can_pin` is false.
        """
        if adapters and not self.can_pin([adapter.rank for adapter in adapters]):
            raise InvalidRequest(
                f"These {len(adapters)} adapters cannot be pinned together: the device holds {self.slots.slots} "
                f"adapters in {self.slots.pages} pages of rank columns, and one of each must stay free for others.",
                param="pinned",
            )
        self._messages.put(_SetPinned(tuple(adapters)))

    def can_pin(self, ranks: Collection[int]) -> bool:
        """Whether adapters of these ranks can be pinned together and leave a slot and a page for other adapters."""
        return len(ranks) < self.slots.slots and sum(map(pages_for, ranks)) < self.slots.pages

    @property
    def max_probe_tokens(self) -> int:
        """Longest prompt of a probe, in tokens: it must fit one step."""
        return self.scheduler.max_tokens

    def stats(self) -> EngineStats:
        """The last snapshot. For any thread."""
        return self._stats

    def start(self) -> None:
        """Run the loop on a thread of its own, the only one that uses several torch threads from then on.

        Each thread that computes in parallel has its own team of OpenMP threads. libgomp's threads spin at barriers
        only while all teams together have no more threads than there are processors. With one more team, even an idle
        one, each barrier is a system call, and steps take half as long again.
        """
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()
        self._started.wait()
        torch.set_num_threads(1)  # for this thread, and by default for threads started later

    def stop(self) -> None:
        """End the loop after the current step. All unfinished sequences fail."""
        self._stopping = True
        self._wake_up()
        if self._thread:
            self._thread.join()
        try:
            self._fail_all("The server is shutting down.")
        finally:
            self.loader.close()
            self.runner.close()

    # The engine's own thread

    def step(self) -> list[Event]:
        """Run one step: at most one forward pass. Returns the events of this step."""
        events: list[Event] = []
        self._handle_messages()
        events += self._load_adapters()
        events += self._fail_copies()
        self.slots.copying = frozenset(a for a in self.slots.resident if not self.runner.is_ready(a))
        batch = self.scheduler.schedule(time.monotonic())
        self._idle = not batch.chunks
        if batch.chunks:
            events += self._run_batch(batch)
        self._unfinished.difference_update(e.sequence_id for e in events if is_last(e))
        self._stats = self._snapshot()
        return events

    def check(self) -> None:
        """Assert that every block, page and lease is accounted for."""
        self.scheduler.check()
        assert set(self.slots.resident) == set(self.runner.resident)
        for adapter in self.slots.resident:
            assert self.slots.pages_of(adapter) == self.runner.resident[adapter].pages

    def _loop(self) -> None:
        torch.set_num_threads(self._threads)
        torch.get_num_threads()  # fixes the number for this thread: start() changes the default next
        self.runner.backend.bind_threads()
        self._started.set()
        try:
            while not self._stopping:
                if self._idle:
                    self._wait_for_message()
                events = self.step()
                if events:
                    self._deliver(events)
        except BaseException:  # a panic of a Rust library is no Exception, and nothing else would tell the clients
            log.exception("The engine has stopped")
            self._dead = True
            self._stats = replace(self._stats, healthy=False)
            self._fail_all("The engine has stopped.")

    def _wait_for_message(self) -> None:
        """Handle the next message. While sequences wait, return after 50 ms: their ``max_wait`` may have passed."""
        if not self.scheduler.waiting:
            self._check_integrity()
        try:
            self._handle_message(self._messages.get(timeout=0.05 if self.scheduler.waiting else None))
        except Empty:
            return

    def _check_integrity(self) -> None:
        """Check for leaks while the engine is idle. A leak is a bug to log, not a reason to stop serving."""
        try:
            self.check()
        except AssertionError:
            log.exception("Blocks, pages or leases have leaked")

    def _handle_messages(self) -> None:
        while not self._messages.empty():
            self._handle_message(self._messages.get())
        for adapter in [a for a in self._to_remove if not self.slots.leases(a) and a not in self.slots.pinned]:
            self._to_remove.discard(adapter)
            self.loader.drop(adapter)
            if adapter in self.slots:
                self.slots.evict(adapter)
                self.runner.evict(adapter)

    def _handle_message(self, message: _Message) -> None:
        match message:
            case _Submit(sequence):
                self.scheduler.add(sequence)
            case _Abort(sequence_id):
                self.scheduler.abort(sequence_id)
                self._unfinished.discard(sequence_id)
            case _RemoveAdapter(adapter):
                self._to_remove.add(adapter)
            case _SetPinned(adapters):
                self.scheduler.pin(adapters, time.monotonic())
            case _WakeUp():
                pass

    def _load_adapters(self) -> list[Failed]:
        """Move missing adapters one stage on: from disk to host memory, or from there to the device."""
        events: list[Failed] = []
        for adapter, error in self.loader.collect().items():
            events += self._fail_adapter(adapter, error)
        budget = COPIES_PER_STEP if self.scheduler.running else self.slots.slots
        loading: set[AdapterId] = set()
        for wanted, keep, sequence in self.scheduler.missing_adapters():
            packed = self.loader.get(wanted.id)
            if packed is None:
                loading.add(wanted.id)
                if len(loading) > min(MAX_PREFETCH, self.loader.max_prefetch):
                    break
                self.loader.request(wanted.id)
                continue
            placement = self.slots.place(wanted.id, packed.rank, keep, time.monotonic()) if budget else None
            if placement is None and sequence is None:
                continue  # a pin waits for free space or idle adapters, without holding up waiting sequences
            if placement is None:
                if sequence and (fit_error := self.slots.fit_error(sequence.adaptation)):
                    events += self._fail([sequence], fit_error)  # others were pinned after it was queued or preempted
                break
            for evicted in placement.evicted:
                self.runner.evict(evicted)
            self._counters.adapter_evictions += len(placement.evicted)
            try:
                self.runner.place(wanted.id, placement.pages, packed)
            except Exception as error:  # usually out of device memory; the next user of the pages overwrites them
                self.slots.evict(wanted.id)
                self._wake_up()  # other adapters may be missing, and an idle engine would wait for a message
                return events + self._fail_adapter(wanted.id, error)
            self._counters.adapter_loads += 1
            budget -= 1
        return events

    def _fail_copies(self) -> list[Failed]:
        """Fail the sequences of adapters whose copy to the device has failed."""
        events: list[Failed] = []
        for adapter, error in self.runner.failed_copies().items():
            affected = [s for s in self.scheduler.running if any(a.id == adapter for a in s.adaptation)]
            events += self._fail(affected, "The adapter could not be loaded.")
            self.slots.evict(adapter)
            self.runner.evict(adapter)
            events += self._fail_adapter(adapter, error)
        return events

    def _fail_adapter(self, adapter: AdapterId, error: BaseException) -> list[Failed]:
        affected = [s for s in self.scheduler.waiting if any(a.id == adapter for a in s.adaptation)]
        if self.scheduler.pins_to_load.pop(adapter, None) or affected:
            # If nothing needs it any more, it may just have been deleted: not worth a log line.
            log.error("Adapter %s could not be loaded: %s", adapter, error)
        at_fault = isinstance(error, AdapterError) and not isinstance(error, StoreFull | RegistryUnavailable)
        return self._fail(affected, "The adapter could not be loaded.", "adapter" if at_fault else "engine")

    def _run_batch(self, batch: Batch) -> list[Event]:
        started = time.perf_counter()
        try:
            result = self.runner.run(batch)
        except Exception:
            log.exception("A step of %d sequences failed", len(batch.chunks))
            self._counters.failed_steps += 1
            self._failures_in_a_row += 1
            return list(
                self._fail([chunk.sequence for chunk in batch.chunks], "The step that served this request failed.")
            )
        self._failures_in_a_row = 0
        self.scheduler.speculation.record_step(batch, time.perf_counter() - started)
        self._counters.count(batch)
        events = commit(self.scheduler, batch, result, time.monotonic())
        self._counters.output_tokens += sum(isinstance(event, Token) for event in events)
        return events

    def _fail(self, sequences: Iterable[Sequence], message: str, cause: Cause = "engine") -> list[Failed]:
        events = []
        for sequence in sequences:
            self.scheduler.release(sequence)
            events.append(Failed(sequence.id, message, cause))
        return events

    def _fail_all(self, message: str) -> None:
        """Fail all unfinished sequences, once no further step will run."""
        while not self._messages.empty():
            self._handle_message(self._messages.get())
        events = self._fail([*self.scheduler.running, *self.scheduler.waiting], message)
        self._unfinished.clear()
        self._stats = self._snapshot()
        if events:
            self._deliver(list(events))

    def _snapshot(self) -> EngineStats:
        scheduler = self.scheduler
        return EngineStats(
            **asdict(self._counters),
            preemptions=scheduler.preemptions,
            drafted_tokens=scheduler.speculation.drafted,
            accepted_tokens=scheduler.speculation.accepted,
            waiting=len(scheduler.waiting),
            running=len(scheduler.running),
            blocks_used=scheduler.blocks.used,
            blocks_total=scheduler.blocks.total,
            device_adapters=frozenset(self.slots.resident),
            pinned_adapters=frozenset(self.slots.pinned),
            host_adapters=self.loader.adapters,
            running_adapters=frozenset(a.id for s in scheduler.running for a in s.adaptation),
            waiting_adapters=frozenset(a.id for s in scheduler.waiting for a in s.adaptation),
            healthy=self._failures_in_a_row < MAX_FAILED_STEPS and not self._dead,
        )

    def _wake_up(self) -> None:
        self._messages.put(_WakeUp())
