"""Engine: the single owner of queues, blocks, slots and the device. Takes sequences and delivers events.

One thread runs ``step`` in a loop. All other threads only put messages into a queue or read the last snapshot of the
stats, so no locks are needed. Each step handles messages, loads adapters, schedules a batch, runs it and commits it.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue

import torch

from adapters.format.spec import AdapterId
from adapters.format.weights import AdapterWeights
from server.config import Settings
from server.engine.block_pool import BlockPool
from server.engine.loader import Loader
from server.engine.residency import Residency
from server.engine.resilience.backlog import Backlog
from server.engine.resilience.step_runner import StepRunner, fail
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler
from server.engine.sequence import Cause, Event, Failed, Sequence, WeightedAdapter, is_last
from server.engine.slots import SlotTable, pages_for
from server.engine.speculation import Speculation
from server.engine.stats import EngineStats, StepCounters, StepTimes
from server.errors import EngineError, InvalidRequest

log = logging.getLogger(__name__)

STOP_SECONDS = 10.0
"""How long the end waits for a step that still runs."""


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
            BlockPool(self.runner.blocks, settings.block_size, share_prefixes=settings.share_prefixes),
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
        self.backlog = Backlog(settings.max_queue, self.scheduler.max_sequences, settings.max_queue_tokens)
        self._deliver = deliver
        self._messages: SimpleQueue[_Message] = SimpleQueue()
        self._counters = StepCounters()
        self._times = StepTimes()
        self._residency = Residency(
            self.runner, self.scheduler, self.loader, self._counters, self._times, wake_up=self._wake_up
        )
        self._steps = StepRunner(
            runner,
            self.scheduler,
            self._counters,
            self._times,
            release_memory=self._residency.release_memory,
            fail_copies=self._residency.fail_copies,
        )
        self.watch = self._steps.watch
        self._idle = True
        self._stopping = False
        self._dead = False
        self._threads = settings.cpu_threads
        self._thread: threading.Thread | None = None
        self._started = threading.Event()
        self._stats = self._snapshot()

    # For any thread

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence. Probes do not count towards ``max_queue`` and ``max_queue_tokens``.

        Raises QueueFull, EngineError if the engine has stopped, and InvalidRequest if its adapters can never fit, or
        if it asks for nothing.
        """
        self._check_alive()
        if not (sequence.samples or sequence.pooling or sequence.scores is not None):
            raise InvalidRequest("max_tokens: 0 needs prompt_logprobs; give at least 1.", param="max_tokens")
        if fit_error := self.slots.fit_error(sequence.adaptation):
            raise InvalidRequest(fit_error, param="adapter")
        if not sequence.probe:
            self.backlog.admit(sequence)
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

    @property
    def hangs(self) -> bool:
        """Whether it was stopped, and its thread has not ended."""
        return self._stopping and self._thread is not None and self._thread.is_alive()

    def stop(self) -> None:
        """End the loop after the current step. All unfinished sequences fail.

        If the step does not end within STOP_SECONDS, leave everything as it is: see :attr:`hangs`.
        """
        waited, self._stopping = self._stopping, True
        self._wake_up()
        if self._thread:
            self._thread.join(0 if waited else STOP_SECONDS)
        if self.hangs:
            log.error("A step has not ended %.0f s after the engine was to stop", STOP_SECONDS)
            return
        try:
            self._fail_all("The server is shutting down.")
        finally:
            self.loader.close()
            self.runner.close()

    # The engine's own thread

    def step(self) -> list[Event]:
        """Run one step: at most one forward pass. Returns the events of this step."""
        events: list[Event] = []
        began = time.perf_counter()
        self._handle_messages()
        events += self._residency.advance(time.monotonic())
        loaded, now = time.perf_counter(), time.monotonic()
        self.scheduler.row_limit = self._steps.rows(now)
        batch = self.scheduler.schedule(now)
        overdue = self._fail(self.scheduler.take_overdue(), "The request's timeout has passed.", "deadline")
        self._counters.overdue += len(overdue)
        events += overdue
        self._idle = not batch.chunks
        if batch.chunks:
            self._times.add("load", loaded - began)
            self._times.add("schedule", time.perf_counter() - loaded)
            self.backlog.begin(chunk.sequence.id for chunk in batch.chunks)
            events += self._steps.run(batch)
        if events:
            self.backlog.end(e.sequence_id for e in events if is_last(e))
        self._stats = self._snapshot()
        return events

    def check(self) -> None:
        """Assert that every block, page and lease is accounted for."""
        self.scheduler.check()
        self._residency.check()

    def _loop(self) -> None:
        torch.set_num_threads(self._threads)
        torch.get_num_threads()  # fixes the number for this thread: start() changes the default next
        self.runner.backend.bind_threads()
        self._started.set()
        try:
            while not self._stopping:
                if self._idle:
                    self.watch.rest()
                    self._wait_for_message()
                self.watch.begin()
                events = self.step()
                if events:
                    self._deliver(events)
        except BaseException:  # a panic of a Rust library is no Exception, and nothing else would tell the clients
            log.exception("The engine has stopped")
            self._dead = True
            self._stats = replace(self._stats, healthy=False)
            self._fail_all("The engine has stopped.")
        finally:
            self.watch.rest()

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
        self._residency.remove_unused()

    def _handle_message(self, message: _Message) -> None:
        match message:
            case _Submit(sequence):
                self.scheduler.add(sequence)
            case _Abort(sequence_id):
                self.scheduler.abort(sequence_id)
                self.backlog.end([sequence_id])
            case _RemoveAdapter(adapter):
                self._residency.remove(adapter)
            case _SetPinned(adapters):
                self.scheduler.admission.pin(adapters, time.monotonic())
            case _WakeUp():
                pass

    def _fail(self, sequences: Iterable[Sequence], message: str, cause: Cause = "engine") -> list[Failed]:
        return fail(self.scheduler, sequences, message, cause)

    def _fail_all(self, message: str) -> None:
        """Fail all unfinished sequences, once no further step will run."""
        while not self._messages.empty():
            self._handle_message(self._messages.get())
        events = self._fail([*self.scheduler.running, *self.scheduler.waiting], message)
        self.backlog.end(event.sequence_id for event in events)
        self._stats = self._snapshot()
        if events:
            self._deliver(list(events))

    def _snapshot(self) -> EngineStats:
        scheduler = self.scheduler
        return EngineStats(
            **vars(self._counters),
            preemptions=scheduler.preemptions,
            drafted_tokens=scheduler.speculation.drafted,
            accepted_tokens=scheduler.speculation.accepted,
            waiting=len(scheduler.waiting),
            running=len(scheduler.running),
            blocks_used=scheduler.blocks.used,
            blocks_cached=scheduler.blocks.cached,
            blocks_total=scheduler.blocks.total,
            host_misses=self.loader.reads,
            host_evictions=self.loader.evictions,
            host_bytes=self.loader.nbytes,
            device_adapters=frozenset(self.slots.resident),
            pinned_adapters=frozenset(self.slots.pinned),
            host_adapters=self.loader.adapters,
            running_adapters=frozenset(a.id for s in scheduler.running for a in s.adaptation),
            waiting_adapters=scheduler.waiting.adapters,
            waiting_tenants=len(scheduler.waiting.tenants),
            healthy=self._steps.healthy and not self._dead,
            times=self._times,
        )

    def _wake_up(self) -> None:
        self._messages.put(_WakeUp())
