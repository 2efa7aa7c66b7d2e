"""Scheduler: which tokens of which sequences run in the next step.

There are no prefill and decode phases. A sequence has ``computed`` of its ``len(tokens)`` tokens, and a step computes
some of the others: that covers chunked prefill, decoding, prefix-cache hits and resumption after a preemption (the idea
is vLLM v1's). Running sequences come first, oldest first. When no blocks are free, the youngest one is preempted.

A waiting sequence whose adapters are not on the device is skipped. After ``max_wait`` seconds, the least used adapters
take no new sequences until it fits.

Drafted tokens are verified in the step of the token before them. Keys and values of rejected ones are overwritten.

The log probabilities of a prompt need logits for each of its tokens, so they, too, limit how long a chunk is. What was
read of a prompt (log probabilities, a sum of hidden states) survives a preemption, and prefix hits end there.

Probes come first in the queue and run alone, at most every other step. So all probes compute with the same shapes, and
their logits can be compared bit by bit; and a probe does not change how the tokens of other sequences are rounded.
"""

from collections import Counter, deque
from collections.abc import Iterable, Iterator

from adapters.format.spec import AdapterId
from server.engine.block_pool import BlockPool, chain_keys
from server.engine.sequence import Batch, Chunk, Sequence, WeightedAdapter
from server.engine.slots import SlotTable
from server.engine.speculation import MAX_ROWS, Speculation

MAX_SCORED_ROWS = 256
"""Tokens of prompts whose log probabilities one step computes: for each, a row of logits of the whole vocabulary."""


class Scheduler:
    """The waiting and running sequences, which use a pool of blocks and a table of slots. For one thread."""

    def __init__(
        self,
        blocks: BlockPool,
        slots: SlotTable,
        *,
        max_sequences: int,
        max_tokens: int,
        max_wait: float,
        speculation: Speculation,
    ) -> None:
        self.blocks = blocks
        self.slots = slots
        self.max_sequences = min(max_sequences, max_tokens)
        self.max_tokens = max_tokens
        self.max_wait = max_wait
        self.speculation = speculation
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.pins_to_load: dict[AdapterId, WeightedAdapter] = {}
        """Pinned adapters, which are loaded without a request; those that could not be loaded are taken out."""
        self._pinned_at = 0.0
        self._last_was_probe = False
        self._scored_rows = 0
        """Tokens of prompts whose log probabilities the step will compute."""

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        if sequence.probe:
            self.waiting.insert(self._waiting_probes, sequence)
        else:
            self.waiting.append(sequence)

    def pin(self, adapters: Iterable[WeightedAdapter], now: float) -> None:
        """Pin these adapters and unpin all others. ``now`` is ``time.monotonic()``."""
        self.pins_to_load = {adapter.id: adapter for adapter in adapters}
        self.slots.pinned = {adapter.id: adapter.rank for adapter in self.pins_to_load.values()}
        self._pinned_at = now

    def schedule(self, now: float) -> Batch:
        """Return the next batch, which is empty if nothing can run. ``now`` is ``time.monotonic()``."""
        chunks = (
            (not self._last_was_probe and self._schedule_probe(now))
            or self._schedule_requests(now)
            or self._schedule_probe(now)
        )
        batch = Batch(tuple(chunks), self.blocks.take_new())
        self._last_was_probe = batch.probe
        return batch

    def abort(self, sequence_id: str) -> bool:
        """Drop a waiting or running sequence. Returns whether there was one of this id."""
        for sequence in (*self.running, *self.waiting):
            if sequence.id == sequence_id:
                self.release(sequence)
                return True
        return False

    def release(self, sequence: Sequence) -> None:
        """End a sequence: remove it from its queue, and free its blocks and leases. Every end goes through here."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._free(sequence)
        self.speculation.forget(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks and leases, and queue it again, before all others but probes."""
        self.running.remove(sequence)
        self._free(sequence)
        self.waiting.insert(self._waiting_probes, sequence)
        sequence.preemptions += 1
        self.preemptions += 1

    def running_by_adapter(self) -> Counter[AdapterId]:
        """Number of running sequences of each adapter."""
        return Counter(adapter.id for sequence in self.running for adapter in sequence.adaptation)

    def missing_adapters(self) -> Iterator[tuple[WeightedAdapter, set[AdapterId], Sequence | None]]:
        """Adapters to load: pinned ones, then those of waiting sequences, in queue order.

        Each comes with the adapters that must not be evicted for it, and with its sequence, if any. No adapter of a
        sequence is evicted for one behind it in the queue: the adapters of a mix are loaded one by one, and two mixes
        could otherwise evict each other's for ever.
        """
        keep: set[AdapterId] = set()
        for adapter in self._missing_pins():
            yield adapter, keep, None
        for sequence in self.waiting:
            keep.update(adapter.id for adapter in sequence.adaptation)
            for adapter in sequence.adaptation:
                if adapter.id not in self.slots:
                    yield adapter, keep, sequence

    def check(self) -> None:
        """Assert that exactly the unfinished sequences hold blocks, and the running ones leases."""
        self.blocks.check(sequence.blocks for sequence in (*self.running, *self.waiting))
        self.slots.check(self.running_by_adapter())
        assert all(sequence.leased for sequence in self.running)
        assert not any(sequence.leased or sequence.blocks for sequence in self.waiting)

    def _free(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0
        if sequence.leased:
            self.slots.release(adapter.id for adapter in sequence.adaptation)
            sequence.leased = False
            if sequence.probe:
                self.slots.demote(adapter.id for adapter in sequence.adaptation)

    # Probes

    @property
    def _waiting_probes(self) -> int:
        """Number of waiting probes: they come first in the queue."""
        return next((i for i, sequence in enumerate(self.waiting) if not sequence.probe), len(self.waiting))

    def _schedule_probe(self, now: float) -> list[Chunk]:
        """Run the first probe whose adapter is on the device. If too few blocks are free, preempt the youngest."""
        for sequence in self.waiting:
            if not sequence.probe:
                break
            if all(adapter.id in self.slots for adapter in sequence.adaptation):
                while self.blocks.blocks_for(len(sequence.tokens)) > self.blocks.free:
                    self.preempt(self.running[-1])
                self._take_blocks(sequence)
                return [self._start(sequence, self.max_tokens, now)]
        return []

    # Running sequences

    def _schedule_requests(self, now: float) -> list[Chunk]:
        """Chunks of all sequences but probes."""
        self._scored_rows = 0
        chunks = self._schedule_running()
        chunks += self._schedule_waiting(now, self.max_tokens - sum(chunk.length for chunk in chunks))
        chunks = self._add_drafts(chunks)
        chunks.sort(key=lambda chunk: chunk.length > 1)
        return chunks

    def _schedule_running(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        for sequence, length in self._token_shares():
            if sequence not in self.running:
                break  # preempted, and so are all younger ones
            if length and self._grow(sequence, sequence.computed + length):
                chunks.append(Chunk(sequence, sequence.computed, length))
        return chunks

    def _token_shares(self) -> list[tuple[Sequence, int]]:
        """How many tokens each running sequence gets: one each, then the rest of the budget, oldest first."""
        spare = self.max_tokens - len(self.running)
        shares = []
        for sequence in self.running:
            length = self._limit_scores(sequence, min(len(sequence.tokens) - sequence.computed, 1 + spare))
            spare -= length - 1
            shares.append((sequence, length))
        return shares

    def _limit_scores(self, sequence: Sequence, length: int) -> int:
        """``length`` of a chunk, or as much of it, at least 1, as the step may compute log probabilities for."""
        if sequence.scores is None:
            return length
        start, unread, left = sequence.computed, sequence.unread, max(MAX_SCORED_ROWS - self._scored_rows, 0)
        if min(start + length, unread.stop) > max(start, unread.start) + left:
            length = max(1, max(start, unread.start) + left - start)
        self._scored_rows += len(Chunk(sequence, start, length).read)
        return length

    def _grow(self, sequence: Sequence, end: int) -> bool:
        """Allocate blocks up to position ``end``. Preempts the youngest if needed; False if that is ``sequence``."""
        need = self.blocks.blocks_for(end) - len(sequence.blocks)
        while need > self.blocks.free:
            youngest = self.running[-1]
            self.preempt(youngest)
            if youngest is sequence:
                return False
        sequence.blocks += self.blocks.allocate(max(need, 0))
        return True

    # Waiting sequences

    def _schedule_waiting(self, now: float, budget: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        closed = self._closed_for_pins(now)
        copying = self.slots.copying if self.running else frozenset()
        for sequence in list(self.waiting):
            if budget < 1 or len(self.running) >= self.max_sequences:
                break
            missing = [adapter for adapter in sequence.adaptation if adapter.id not in self.slots]
            if missing and not closed and now - sequence.arrived > self.max_wait:
                closed = self._closed_for(sequence, missing)
            if sequence.probe or missing or any(adapter.id in closed | copying for adapter in sequence.adaptation):
                continue
            if not self._take_blocks(sequence):
                break  # blocks go first come, first served: a short sequence must not overtake a long one
            chunk = self._start(sequence, budget, now)
            budget -= chunk.length
            chunks.append(chunk)
        return chunks

    def _closed_for(self, sequence: Sequence, missing: list[WeightedAdapter]) -> set[AdapterId]:
        """Adapters that take no sequences queued behind ``sequence``, which has waited too long, until it fits.

        Sequences ahead of it still run: their adapters are not evicted for it, so they must finish first.
        """
        return self.slots.next_to_evict([a.rank for a in missing], {a.id for a in sequence.adaptation})

    def _closed_for_pins(self, now: float) -> set[AdapterId]:
        """Adapters that take no new sequences, because a pinned one has not fitted for too long."""
        missing = self._missing_pins()
        if not missing or now - self._pinned_at <= self.max_wait:
            return set()
        return self.slots.next_to_evict([missing[0].rank], ())

    def _missing_pins(self) -> list[WeightedAdapter]:
        return [adapter for adapter in self.pins_to_load.values() if adapter.id not in self.slots]

    def _take_blocks(self, sequence: Sequence) -> bool:
        """Take prefix-cache hits and allocate blocks for all other tokens; False, and no change, if too few are free.

        A probe gets no hits, which would change the shapes of its step; nor do tokens whose outputs are to be read.
        """
        hits: list[int] = []
        if not sequence.probe:
            chain_keys(sequence, self.blocks.size)
            most = min([len(sequence.tokens) - 1, *sequence.unread[:1]])
            hits = self.blocks.match(sequence.keys[: most // self.blocks.size])
        need = self.blocks.blocks_for(len(sequence.tokens)) - len(hits)
        if need + self.blocks.count_idle(hits) > self.blocks.free:
            return False
        self.blocks.share(hits)
        sequence.blocks = hits + self.blocks.allocate(need)
        sequence.computed = len(hits) * self.blocks.size
        return True

    def _start(self, sequence: Sequence, budget: int, now: float) -> Chunk:
        self.waiting.remove(sequence)
        self.running.append(sequence)
        self.running.sort(key=lambda running: running.arrived)
        probe_only = sequence.probe and not sequence.keep
        self.slots.lease((adapter.id for adapter in sequence.adaptation), probe=probe_only)
        sequence.leased = True
        if sequence.started is None:
            sequence.cached, sequence.started = sequence.computed, now
            placed = max((self.slots.placed_at(adapter.id) for adapter in sequence.adaptation), default=0.0)
            sequence.loading = max(placed - sequence.arrived, 0.0)
        length = self._limit_scores(sequence, min(len(sequence.tokens) - sequence.computed, budget))
        return Chunk(sequence, sequence.computed, length)

    def _add_drafts(self, chunks: list[Chunk]) -> list[Chunk]:
        """Draft tokens for sequences that decode. Leaves a free block for each of them, so that none is preempted."""
        rows = min(self.max_tokens, max(self.max_sequences, MAX_ROWS))
        free = max(self.blocks.free // max(len(chunks), 1) - 1, 0)
        drafted = self.speculation.draft(chunks, rows, lambda s: (len(s.blocks) + free) * self.blocks.size)
        for chunk in drafted:
            self._grow(chunk.sequence, chunk.end)
        return drafted
