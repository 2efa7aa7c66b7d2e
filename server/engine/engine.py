"""Engine: the single owner of queues, blocks, slots and the device. Takes sequences, gives events.

One thread runs ``step`` in a loop; every other thread only drops messages into the inbox or reads the last snapshot, so
nothing here needs a lock. Each step: take in messages, bring adapters to the device, schedule, run, commit.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue

import torch

from adapters.errors import AdapterError, RegistryUnavailable, StoreFull
from adapters.format.spec import AdapterId
from adapters.format.weights import AdapterWeights
from server.config import Settings
from server.engine.block_pool import BlockPool
from server.engine.loader import Loader
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler
from server.engine.sequence import Batch, Cause, Event, Failed, Sequence, WeightedAdapter
from server.engine.slots import SlotTable, pages_for
from server.errors import EngineError, InvalidRequest, QueueFull

log = logging.getLogger(__name__)

PLACEMENTS = 2
"""Adapters copied to the device in one step while others run: a copy must not be felt by those."""
LOOKAHEAD = 8
"""Missing adapters of waiting sequences that are loaded ahead of their turn."""
SICK = 3
"""Failed steps in a row after which the engine calls itself unhealthy."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot made between steps. Counters run from the start."""

    waiting: int = 0
    running: int = 0
    blocks_used: int = 0
    blocks_total: int = 0
    prompt_tokens: int = 0
    """Prompt tokens computed, recomputation after preemption included."""
    cached_tokens: int = 0
    """Prompt tokens taken from the prefix cache."""
    output_tokens: int = 0
    steps: int = 0
    failed_steps: int = 0
    preemptions: int = 0
    adapter_loads: int = 0
    """Adapters copied to the device."""
    adapter_evictions: int = 0
    device: frozenset[AdapterId] = frozenset()
    pinned: frozenset[AdapterId] = frozenset()
    """Meant to stay on the device, there yet or not."""
    host: frozenset[AdapterId] = frozenset()
    running_adapters: frozenset[AdapterId] = frozenset()
    waiting_adapters: frozenset[AdapterId] = frozenset()
    healthy: bool = True


@dataclass(frozen=True, slots=True)
class _Submit:
    sequence: Sequence


@dataclass(frozen=True, slots=True)
class _Abort:
    sequence_id: str


@dataclass(frozen=True, slots=True)
class _Forget:
    adapter: AdapterId


@dataclass(frozen=True, slots=True)
class _Pin:
    adapters: tuple[WeightedAdapter, ...]


class _Wake:
    """Something arrived elsewhere, or the engine stops."""


_Message = _Submit | _Abort | _Forget | _Pin | _Wake


@dataclass(slots=True)
class _Counters:
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    steps: int = 0
    failed_steps: int = 0
    adapter_loads: int = 0
    adapter_evictions: int = 0


class Engine:
    """Serves sequences from one base. ``read`` fetches an adapter's weights; ``deliver`` gets each step's events."""

    def __init__(
        self,
        runner: Runner,
        settings: Settings,
        read: Callable[[AdapterId], AdapterWeights],
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
        )
        self.loader = Loader(
            lambda adapter: self.runner.pool.pack(read(adapter)), int(settings.host_cache_gib * 2**30), self._wake
        )
        self._deliver = deliver
        self._capacity = settings.max_queue + self.scheduler.max_sequences
        self._inbox: SimpleQueue[_Message] = SimpleQueue()
        self._live: set[str] = set()
        self._forgotten: set[AdapterId] = set()
        self._counters = _Counters()
        self._sick = 0
        self._idle = True
        self._stopping = False
        self._dead = False
        self._threads = settings.cpu_threads
        self._thread: threading.Thread | None = None
        self._started = threading.Event()
        self._stats = EngineStats(blocks_total=self.runner.blocks)

    # For any thread

    def submit(self, sequence: Sequence) -> None:
        """Take a sequence. Raises QueueFull, EngineError when stopped, InvalidRequest for adapters that never fit.

        Probes do not count against the queue.
        """
        self._check_alive()
        if misfit := self.slots.misfit(sequence.adaptation):
            raise InvalidRequest(misfit, param="adapter")
        if not sequence.probe:
            if len(self._live) >= self._capacity:
                raise QueueFull("Too many requests wait; try again later.", code="queue_full")
            self._live.add(sequence.id)
        self._inbox.put(_Submit(sequence))
        self._check_alive()  # again: what is put after the last look into the inbox would wait for ever

    def _check_alive(self) -> None:
        if self._dead or self._stopping:
            raise EngineError("The engine has stopped.")

    def abort(self, sequence_id: str) -> None:
        """Drop a sequence before the next step. No event follows; unknown ids are ignored."""
        self._inbox.put(_Abort(sequence_id))

    def forget(self, adapter: AdapterId) -> None:
        """An adapter's content is gone: drop it from device and host as soon as nothing leases it."""
        self._inbox.put(_Forget(adapter))

    def pin(self, adapters: Collection[WeightedAdapter]) -> None:
        """Keep these on the device, and no others: brought as soon as there is room, asked for or not, never evicted.

        Where all room stays leased for ``max_wait`` seconds, the least used adapters take no new sequences until it is
        there. One that cannot be loaded is logged, and tried again when a sequence asks for it or the next pins come.
        Raises InvalidRequest for what :meth:`fits_pinned` denies.
        """
        if adapters and not self.fits_pinned([adapted.rank for adapted in adapters]):
            raise InvalidRequest(
                f"These {len(adapters)} adapters cannot be pinned together: the device holds {self.slots.slots} "
                f"adapters in {self.slots.pages} pages of rank columns, and one of each stays free.",
                param="pinned",
            )
        self._inbox.put(_Pin(tuple(adapters)))

    def fits_pinned(self, ranks: Collection[int]) -> bool:
        """Whether adapters of these ranks may be pinned together: a slot and a page must be left for the others."""
        return len(ranks) < self.slots.slots and sum(map(pages_for, ranks)) < self.slots.pages

    @property
    def longest_probe(self) -> int:
        """Tokens a probe's prompt may have: it runs in one step."""
        return self.scheduler.max_tokens

    def stats(self) -> EngineStats:
        """The last snapshot."""
        return self._stats

    def start(self) -> None:
        """Run the loop on a thread of its own, from then on the only one on which torch computes in parallel.

        libgomp's threads wait actively only while there are no more of them, in teams of all callers together, than
        processors. One more team, even an idle one, and every barrier is a system call: steps take half as long again.
        """
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()
        self._started.wait()
        torch.set_num_threads(1)  # for this thread, and the default of those to come

    def stop(self) -> None:
        """End the loop after the current step; what is left fails."""
        self._stopping = True
        self._wake()
        if self._thread:
            self._thread.join()
        try:
            self._fail_everything("The server is shutting down.")
        finally:
            self.loader.close()
            self.runner.close()

    # The engine's own thread

    def step(self) -> list[Event]:
        """One step: at most one forward pass. Returns what it brought about."""
        events: list[Event] = []
        self._receive()
        events += self._bring_adapters()
        events += self._drop_failed_copies()
        self.slots.arriving = frozenset(a for a in self.slots.resident if not self.runner.arrived(a))
        batch = self.scheduler.schedule(time.monotonic())
        self._idle = not batch.chunks
        if batch.chunks:
            events += self._run(batch)
        self._live.difference_update(e.sequence_id for e in events if isinstance(e, Failed) or e.finish)
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
        torch.get_num_threads()  # a thread takes its number at the first question, and start() changes it next
        self._started.set()
        try:
            while not self._stopping:
                if self._idle:
                    self._wait()
                events = self.step()
                if events:
                    self._deliver(events)
        except Exception:
            log.exception("The engine has stopped")
            self._dead = True
            self._stats = replace(self._stats, healthy=False)
            self._fail_everything("The engine has stopped.")

    def _wait(self) -> None:
        """Sleep until a message comes; with sequences waiting for their age to count, only for a while."""
        if not self.scheduler.waiting:
            self._check_integrity()
        try:
            self._handle(self._inbox.get(timeout=0.05 if self.scheduler.waiting else None))
        except Empty:
            return

    def _check_integrity(self) -> None:
        """An idle engine has time to look whether anything leaked; a leak is a bug to report, not a reason to stop."""
        try:
            self.check()
        except AssertionError:
            log.exception("The engine's books do not add up")

    def _receive(self) -> None:
        while not self._inbox.empty():
            self._handle(self._inbox.get())
        for adapter in [a for a in self._forgotten if not self.slots.leases(a) and a not in self.slots.pinned]:
            self._forgotten.discard(adapter)
            self.loader.drop(adapter)
            if adapter in self.slots:
                self.slots.evict(adapter)
                self.runner.evict(adapter)

    def _handle(self, message: _Message) -> None:
        match message:
            case _Submit(sequence):
                self.scheduler.add(sequence)
            case _Abort(sequence_id):
                self.scheduler.abort(sequence_id)
                self._live.discard(sequence_id)
            case _Forget(adapter):
                self._forgotten.add(adapter)
            case _Pin(adapters):
                self.scheduler.pin(adapters, time.monotonic())
            case _Wake():
                pass

    def _bring_adapters(self) -> list[Failed]:
        """Move adapters that are missing one stage closer: disk to host, host to device."""
        events: list[Failed] = []
        for adapter, error in self.loader.collect().items():
            events += self._fail_adapter(adapter, error)
        budget = PLACEMENTS if self.scheduler.running else self.slots.slots
        ahead: set[AdapterId] = set()
        for adapted, keep, sequence in self.scheduler.missing():
            packed = self.loader.get(adapted.id)
            if packed is None:
                ahead.add(adapted.id)
                if len(ahead) > min(LOOKAHEAD, self.loader.room):
                    break
                self.loader.request(adapted.id)
                continue
            placement = self.slots.place(adapted.id, packed.rank, keep) if budget else None
            if placement is None and sequence is None:
                continue  # a pin takes what is free or idle; those that wait are not held up for more
            if placement is None:
                if sequence and (misfit := self.slots.misfit(sequence.adaptation)):
                    events += self._fail([sequence], misfit)  # pinned since it came, or since it was preempted
                break
            for evicted in placement.evicted:
                self.runner.evict(evicted)
            self._counters.adapter_evictions += len(placement.evicted)
            try:
                self.runner.place(adapted.id, placement.pages, packed)
            except Exception as error:  # out of device memory, above all; whoever gets the pages overwrites them
                self.slots.evict(adapted.id)
                self._wake()  # for what else is missing: an idle engine would wait for the next message
                return events + self._fail_adapter(adapted.id, error)
            self._counters.adapter_loads += 1
            budget -= 1
        return events

    def _drop_failed_copies(self) -> list[Failed]:
        """Adapters that were placed and will not arrive take with them whoever was to run with them."""
        events: list[Failed] = []
        for adapter, error in self.runner.failed_copies().items():
            hit = [s for s in self.scheduler.running if any(adapted.id == adapter for adapted in s.adaptation)]
            events += self._fail(hit, "The adapter could not be loaded.")
            self.slots.evict(adapter)
            self.runner.evict(adapter)
            events += self._fail_adapter(adapter, error)
        return events

    def _fail_adapter(self, adapter: AdapterId, error: BaseException) -> list[Failed]:
        hit = [s for s in self.scheduler.waiting if any(adapted.id == adapter for adapted in s.adaptation)]
        if self.scheduler.owed.pop(adapter, None) or hit:
            # Where nobody wants it any more, its bytes may have gone with its name.
            log.error("Adapter %s could not be loaded: %s", adapter, error)
        content = isinstance(error, AdapterError) and not isinstance(error, StoreFull | RegistryUnavailable)
        return self._fail(hit, "The adapter could not be loaded.", "adapter" if content else "engine")

    def _run(self, batch: Batch) -> list[Event]:
        try:
            tokens, logits = self.runner.run_probe(batch) if batch.probe else (self.runner.run(batch), None)
        except Exception:
            log.exception("A step of %d sequences failed", len(batch.chunks))
            self._counters.failed_steps += 1
            self._sick += 1
            return list(
                self._fail([chunk.sequence for chunk in batch.chunks], "The step that served this request failed.")
            )
        self._sick = 0
        self._count(batch)
        return list(self.scheduler.commit(batch, tokens, logits))

    def _fail(self, sequences: Iterable[Sequence], message: str, cause: Cause = "engine") -> list[Failed]:
        events = []
        for sequence in sequences:
            self.scheduler.release(sequence)
            events.append(Failed(sequence.id, message, cause))
        return events

    def _fail_everything(self, message: str) -> None:
        """The last word to every client: called when no further step will run."""
        while not self._inbox.empty():
            self._handle(self._inbox.get())
        events = self._fail([*self.scheduler.running, *self.scheduler.waiting], message)
        self._live.clear()
        self._stats = self._snapshot()
        if events:
            self._deliver(list(events))

    def _count(self, batch: Batch) -> None:
        c = self._counters
        c.steps += 1
        c.output_tokens += len(batch.sampled)
        for chunk in batch.chunks:
            c.prompt_tokens += max(0, min(chunk.end, chunk.sequence.prompt_length) - chunk.start)
            first = chunk.start == chunk.sequence.cached and not chunk.sequence.preemptions
            if first and not chunk.sequence.output_length:
                c.cached_tokens += chunk.sequence.cached

    def _snapshot(self) -> EngineStats:
        c, scheduler = self._counters, self.scheduler
        return EngineStats(
            waiting=len(scheduler.waiting),
            running=len(scheduler.running),
            blocks_used=scheduler.blocks.used,
            blocks_total=scheduler.blocks.total,
            prompt_tokens=c.prompt_tokens,
            cached_tokens=c.cached_tokens,
            output_tokens=c.output_tokens,
            steps=c.steps,
            failed_steps=c.failed_steps,
            preemptions=scheduler.preemptions,
            adapter_loads=c.adapter_loads,
            adapter_evictions=c.adapter_evictions,
            device=frozenset(self.slots.resident),
            pinned=frozenset(self.slots.pinned),
            host=self.loader.host,
            running_adapters=frozenset(a.id for s in scheduler.running for a in s.adaptation),
            waiting_adapters=frozenset(a.id for s in scheduler.waiting for a in s.adaptation),
            healthy=self._sick < SICK and not self._dead,
        )

    def _wake(self) -> None:
        self._inbox.put(_Wake())
