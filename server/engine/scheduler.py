"""Scheduler: which tokens of which sequences run in the next step.

There are no prefill and decode phases. A sequence has ``computed`` of its ``len(tokens)`` tokens, and a step computes
some of the others: that covers chunked prefill, decoding, prefix-cache hits and resumption after a preemption (the idea
is vLLM v1's). Each running sequence gets one token; the rest of the step's tokens goes to prompts, of running sequences
and of waiting ones that start, in the order of :mod:`server.engine.waiting.fairness`. When no blocks are free, the
youngest sequence of the tenant that was served most is preempted. When there is no room for a waiting sequence of a
tenant that holds less than others, the youngest one of another is, too.

A waiting sequence whose adapters are not on the device is skipped (:mod:`server.engine.waiting.admission`).

Drafted tokens are verified in the step of the token before them. Keys and values of rejected ones are overwritten.

The log probabilities of a prompt need logits for each of its tokens, so they, too, limit how long a chunk is. What was
read of a prompt (log probabilities, a sum of hidden states) survives a preemption, and prefix hits end there.

Probes come first in the queue and run alone, at most every other step. So all probes compute with the same shapes, and
their logits can be compared bit by bit; and a probe does not change how the tokens of other sequences are rounded.
"""

from collections import Counter
from itertools import chain

from adapters.format.spec import AdapterId
from server.engine.block_pool import BlockPool
from server.engine.sequence import Batch, Chunk, Sequence
from server.engine.slots import SlotTable
from server.engine.speculation import MAX_ROWS, Speculation
from server.engine.waiting.admission import Admission, Openings
from server.engine.waiting.deadlines import Deadlines
from server.engine.waiting.fairness import PROMPT_TOKEN, FairQueue, find_holder

MAX_SCORED_ROWS = 256
"""Tokens of prompts whose log probabilities one step computes: for each, a row of logits of the whole vocabulary."""

Shares = dict[Sequence, int]
"""Tokens of each sequence in the next step."""


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
        self.row_limit = max_tokens
        """Rows of the next steps, but for probes: fewer than ``max_tokens`` after memory ran out. Set by Engine."""
        self.speculation = speculation
        self.waiting = FairQueue()
        self.admission = Admission(self.waiting, slots, max_wait)
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._deadlines = Deadlines(max_tokens)
        self._overdue: list[Sequence] = []
        self._last_was_probe = False
        self._scored_rows = 0
        """Tokens of prompts whose log probabilities the step will compute."""

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.add(sequence)
        self._deadlines.add(sequence)

    def schedule(self, now: float) -> Batch:
        """Return the next batch, which is empty if nothing can run. ``now`` is ``time.monotonic()``."""
        for sequence in self._deadlines.passed(chain(self.running, self.waiting), now):
            self._stop(sequence)
        self.running.sort(key=lambda running: (self.waiting.served(running), running.arrived))
        chunks = (
            (not self._last_was_probe and self._schedule_probe(now))
            or self._schedule_requests(now)
            or self._schedule_probe(now)
        )
        batch = Batch(tuple(chunks), self.blocks.take_new())
        self._last_was_probe = batch.probe
        return batch

    def record_step(self, batch: Batch, seconds: float) -> None:
        """Take in how long a step took."""
        self.speculation.record_step(batch, seconds)
        self._deadlines.record_step(batch, seconds)

    def take_overdue(self) -> list[Sequence]:
        """Return the sequences that ended since the last call because they cannot meet their deadlines."""
        overdue, self._overdue = self._overdue, []
        return overdue

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
        elif self.waiting.is_waiting(sequence):
            self.waiting.remove(sequence)
        self.waiting.forget(sequence)
        self._free(sequence)
        self.speculation.forget(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks and leases, and queue it again, before all others of its tenant."""
        self.running.remove(sequence)
        self._free(sequence)
        sequence.preemptions += 1
        self.preemptions += 1
        self.waiting.add(sequence)

    def running_by_adapter(self) -> Counter[AdapterId]:
        """Number of running sequences of each adapter."""
        return Counter(adapter.id for sequence in self.running for adapter in sequence.adaptation)

    def check(self) -> None:
        """Assert that exactly the unfinished sequences hold blocks, and the running ones leases."""
        self.blocks.check(sequence.blocks for sequence in (*self.running, *self.waiting))
        self.slots.check(self.running_by_adapter())
        assert all(sequence.leased for sequence in self.running)
        assert not any(sequence.leased or sequence.blocks for sequence in self.waiting)
        self.waiting.check(self.running)

    def _stop(self, sequence: Sequence) -> None:
        self.release(sequence)
        self._overdue.append(sequence)

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

    def _schedule_probe(self, now: float) -> list[Chunk]:
        """Run the first probe whose adapter is on the device. If too few blocks are free, preempt others."""
        for sequence in self.waiting.probes:
            if all(adapter.id in self.slots for adapter in sequence.adaptation):
                while self.blocks.blocks_for(len(sequence.tokens)) > self.blocks.free:
                    self.preempt(self.running[-1])
                self._take_blocks(sequence)
                self._start(sequence, now)
                return [Chunk(sequence, 0, min(len(sequence.tokens), self.max_tokens))]
        return []

    # Running sequences

    def _schedule_requests(self, now: float) -> list[Chunk]:
        """Chunks of all sequences but probes."""
        self._scored_rows = 0
        shares = self._schedule_running()
        self._schedule_prompts(shares, now)
        chunks = [Chunk(sequence, sequence.computed, length) for sequence, length in shares.items()]
        chunks = self._add_drafts(chunks)
        chunks.sort(key=lambda chunk: chunk.length > 1)
        return chunks

    def _schedule_running(self) -> Shares:
        """Give each running sequence the blocks of its tokens so far, and one token of the step."""
        shares: Shares = {}
        for sequence in list(self.running):
            if not sequence.leased:
                break  # preempted, and so are all after it
            if self._grow(sequence, len(sequence.tokens)):
                shares[sequence] = 1
        return shares

    def _schedule_prompts(self, shares: Shares, now: float) -> None:
        """Give the rest of the step's tokens to prompts, in fair order: of running sequences, and of waiting ones.

        Within a tenant, the running ones come first, and of those the oldest.
        """
        prompts = [s for s in shares if s.computed < s.prompt_length or len(s.tokens) - s.computed > 1]
        openings = self._openings(now)
        while True:
            spare = max(self.row_limit - sum(shares.values()), 0)
            flow = self.admission.first(openings, now) if openings and spare > 0 else None
            prompts = [sequence for sequence in prompts if sequence in shares]  # else preempted for a waiting one
            firsts = {sequence.tenant: sequence for sequence in reversed(prompts)}
            if flow:
                firsts.setdefault(flow.head.tenant, flow.head)
            if not firsts:
                return
            following = min(firsts.values(), key=self.waiting.served_after_prompt)
            if following in shares:
                prompts.remove(following)
                self._share(shares, following, min(len(following.tokens) - following.computed, 1 + spare))
            elif not self._admit(following, shares, now):
                openings = None  # who is next gets the next room: a short prompt must not overtake a long one

    def _share(self, shares: Shares, sequence: Sequence, length: int) -> None:
        """Give a prompt ``length`` tokens of the step, or as many as it may have, and charge those that are new."""
        shares[sequence] = length = self._limit_scores(sequence, length)
        charged = min(sequence.computed + length, sequence.prompt_length)
        if charged > sequence.charged:
            self.waiting.charge(sequence, PROMPT_TOKEN * (charged - sequence.charged))
            sequence.charged = charged

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
        """Allocate blocks up to position ``end``. Preempts the last if needed; False if that is ``sequence``."""
        need = self.blocks.blocks_for(end) - len(sequence.blocks)
        while need > self.blocks.free:
            last = self.running[-1]
            self.preempt(last)
            if last is sequence:
                return False
        sequence.blocks += self.blocks.allocate(max(need, 0))
        return True

    # Waiting sequences

    def _openings(self, now: float) -> Openings | None:
        """Return who may start, or None if there is certainly no place for it."""
        if not len(self.waiting):
            return None
        tenants = self.waiting.tenants
        if self._is_full and len(tenants) < 2 and all(running.tenant in tenants for running in self.running):
            return None
        return self.admission.openings(now, self.slots.copying if self.running else frozenset())

    def _admit(self, sequence: Sequence, shares: Shares, now: float) -> bool:
        """Start a waiting sequence if there is a place and blocks for it, or another tenant has too many of them.

        If it cannot meet its deadline, stop it instead. Returns False if it has to wait.
        """
        place = find_holder(sequence, 1, self.running, lambda _: 1) if self._is_full else None
        if self._is_full and place is None:
            return False
        need = self.blocks.blocks_for(len(sequence.tokens))
        while not self._take_blocks(sequence):
            holder = find_holder(sequence, need, self.running, lambda running: len(running.blocks))
            if holder is None:
                return False
            self._take_from(holder, shares)
        if self._deadlines.is_hopeless(sequence, now):
            self._stop(sequence)
            return True
        if self._is_full and place is not None:
            self._take_from(place, shares)
        self._start(sequence, now)
        spare = self.row_limit - sum(shares.values())
        self._share(shares, sequence, min(len(sequence.tokens) - sequence.computed, spare))
        return True

    @property
    def _is_full(self) -> bool:
        return len(self.running) >= self.max_sequences

    def _take_from(self, holder: Sequence, shares: Shares) -> None:
        shares.pop(holder, None)
        self.preempt(holder)

    def _take_blocks(self, sequence: Sequence) -> bool:
        """Take prefix-cache hits and allocate blocks for all other tokens; False, and no change, if too few are free.

        A probe gets no hits, which would change the shapes of its step; nor do tokens whose outputs are to be read.
        """
        hits: list[int] = []
        if not sequence.probe:
            self.blocks.chain_keys(sequence)
            most = min([len(sequence.tokens) - 1, *sequence.unread[:1]])
            hits = self.blocks.match(sequence.keys[: most // self.blocks.size])
        need = self.blocks.blocks_for(len(sequence.tokens)) - len(hits)
        if need + self.blocks.count_idle(hits) > self.blocks.free:
            return False
        self.blocks.share(hits)
        sequence.blocks = hits + self.blocks.allocate(need)
        sequence.computed = len(hits) * self.blocks.size
        return True

    def _start(self, sequence: Sequence, now: float) -> None:
        """Make a waiting sequence that has its blocks a running one."""
        self.waiting.remove(sequence)
        self.running.append(sequence)
        probe_only = sequence.probe and not sequence.keep
        self.slots.lease((adapter.id for adapter in sequence.adaptation), probe=probe_only)
        sequence.leased = True
        if sequence.started is None:
            sequence.cached = sequence.charged = sequence.computed
            sequence.started = now
            placed = max((self.slots.placed_at(adapter.id) for adapter in sequence.adaptation), default=0.0)
            sequence.loading = max(placed - sequence.arrived, 0.0)

    def _add_drafts(self, chunks: list[Chunk]) -> list[Chunk]:
        """Draft tokens for sequences that decode. Leaves a free block for each of them, so that none is preempted."""
        rows = min(self.row_limit, max(self.max_sequences, MAX_ROWS))
        free = max(self.blocks.free // max(len(chunks), 1) - 1, 0)
        drafted = self.speculation.draft(chunks, rows, lambda s: (len(s.blocks) + free) * self.blocks.size)
        for chunk in drafted:
            self._grow(chunk.sequence, chunk.end)
        return drafted
