"""The scheduler: which tokens of which sequences run in the next step.

There is no prefill phase and no decode phase. Each sequence has ``computed`` tokens chasing ``len(tokens)``; chunked
prefill, resumption after preemption and prefix hits are that one subtraction (the idea is vLLM v1's). Running sequences
go first, oldest first; when blocks run out the youngest gives its own back and waits. A sequence whose adapters are not
on the device is passed over, not waited for, until it has been passed over for ``max_wait`` seconds: then the least
used adapters take no new sequences until it fits.

Probes lead the queue and run alone, at most every other step: what a probe computes then has the same shapes as any
other probe's, so that their logits can be compared to the bit, and no row of an answer is rounded otherwise.
"""

from collections import Counter, deque
from collections.abc import Iterable, Iterator

from adapters.format.spec import AdapterId
from server.engine.block_pool import BlockPool, chain_keys
from server.engine.sequence import Batch, Chunk, Failed, FinishReason, Sequence, Token, WeightedAdapter
from server.engine.slots import SlotTable


class Scheduler:
    """Queues of sequences over a pool of blocks and a table of slots. Used by one thread."""

    def __init__(
        self, blocks: BlockPool, slots: SlotTable, *, max_sequences: int, max_tokens: int, max_wait: float
    ) -> None:
        self.blocks = blocks
        self.slots = slots
        self.max_sequences = min(max_sequences, max_tokens)
        self.max_tokens = max_tokens
        self.max_wait = max_wait
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.owed: dict[AdapterId, WeightedAdapter] = {}
        """Pinned adapters to be brought without being asked for; those that are resident need nothing more."""
        self._pinned_at = 0.0
        self._probed = False

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        if sequence.probe:
            self.waiting.insert(self._probes, sequence)
        else:
            self.waiting.append(sequence)

    def pin(self, adapters: Iterable[WeightedAdapter], now: float) -> None:
        """These and no others are pinned from now on, in seconds, monotonic."""
        self.owed = {adapted.id: adapted for adapted in adapters}
        self.slots.pinned = {adapted.id: adapted.rank for adapted in self.owed.values()}
        self._pinned_at = now

    def schedule(self, now: float) -> Batch:
        """What runs next. ``now`` is in seconds, monotonic. Empty when nothing can run."""
        chunks = (not self._probed and self._probe()) or self._ordinary(now) or self._probe()
        batch = Batch(tuple(chunks), self.blocks.take_fresh())
        self._probed = batch.probe
        return batch

    def commit(self, batch: Batch, tokens: list[int | None], logits: bytes | None = None) -> list[Token | Failed]:
        """Take in what the step computed: ``tokens``, one for each of ``batch.sampled`` in order.

        None for a token says that the sequence's logits were not finite: it fails, alone. ``logits`` are a probe's.
        """
        events: list[Token | Failed] = []
        sampled = iter(tokens)
        for chunk in batch.chunks:
            samples = chunk.samples
            self._computed(chunk)
            if samples:
                events.append(self._append(chunk.sequence, next(sampled), logits))
        return events

    def abort(self, sequence_id: str) -> bool:
        """Drop a sequence wherever it is; False if it is nowhere."""
        for sequence in (*self.running, *self.waiting):
            if sequence.id == sequence_id:
                self.release(sequence)
                return True
        return False

    def release(self, sequence: Sequence) -> None:
        """The one way out: queue place, blocks and leases all come back."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._give_back(sequence)

    def users(self) -> Counter[AdapterId]:
        """Running sequences by adapter."""
        return Counter(adapted.id for sequence in self.running for adapted in sequence.adaptation)

    def check(self) -> None:
        """Assert that blocks and leases are exactly those of the live sequences."""
        self.blocks.check(sequence.blocks for sequence in (*self.running, *self.waiting))
        self.slots.check(self.users())
        assert all(sequence.leased for sequence in self.running)
        assert not any(sequence.leased or sequence.blocks for sequence in self.waiting)

    # Probes

    @property
    def _probes(self) -> int:
        """How many lead the queue."""
        return next((i for i, sequence in enumerate(self.waiting) if not sequence.probe), len(self.waiting))

    def _probe(self) -> list[Chunk]:
        """The first probe whose adapter is on the device, with blocks from the youngest where none are free."""
        for sequence in self.waiting:
            if not sequence.probe:
                break
            if all(adapted.id in self.slots for adapted in sequence.adaptation):
                while self.blocks.blocks_for(len(sequence.tokens)) > self.blocks.free:
                    self._preempt(self.running[-1])
                self._take_blocks(sequence)
                return [self._start(sequence, self.max_tokens)]
        return []

    # Running sequences

    def _ordinary(self, now: float) -> list[Chunk]:
        """A step for everybody but probes."""
        chunks = self._continue()
        chunks += self._admit(now, self.max_tokens - sum(chunk.length for chunk in chunks))
        chunks.sort(key=lambda chunk: chunk.length > 1)
        return chunks

    def _continue(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        for sequence, length in self._shares():
            if sequence not in self.running:
                break  # preempted, and so is everything younger
            if length and self._grow(sequence, sequence.computed + length):
                chunks.append(Chunk(sequence, sequence.computed, length))
        return chunks

    def _shares(self) -> list[tuple[Sequence, int]]:
        """How many tokens each running sequence gets: first one each, then what is left in order of age."""
        spare = self.max_tokens - len(self.running)
        shares = []
        for sequence in self.running:
            extra = min(len(sequence.tokens) - sequence.computed - 1, spare)
            spare -= extra
            shares.append((sequence, 1 + extra))
        return shares

    def _grow(self, sequence: Sequence, end: int) -> bool:
        """Give the sequence blocks up to position ``end``, preempting the youngest; False if that was itself."""
        need = self.blocks.blocks_for(end) - len(sequence.blocks)
        while need > self.blocks.free:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        sequence.blocks += self.blocks.allocate(max(need, 0))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._give_back(sequence)
        self.waiting.insert(self._probes, sequence)
        sequence.preemptions += 1
        self.preemptions += 1

    # Waiting sequences

    def _admit(self, now: float, budget: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        draining = self._draining_for_pins(now)
        arriving = self.slots.arriving if self.running else frozenset()
        for sequence in list(self.waiting):
            if budget < 1 or len(self.running) >= self.max_sequences:
                break
            missing = [adapted for adapted in sequence.adaptation if adapted.id not in self.slots]
            if missing and not draining and now - sequence.arrived > self.max_wait:
                draining = self._draining(sequence, missing)
            if sequence.probe or missing or any(adapted.id in draining | arriving for adapted in sequence.adaptation):
                continue
            if not self._take_blocks(sequence):
                break  # memory is first come, first served: small ones do not overtake a large one
            chunk = self._start(sequence, budget)
            budget -= chunk.length
            chunks.append(chunk)
        return chunks

    def _draining(self, sequence: Sequence, missing: list[WeightedAdapter]) -> set[AdapterId]:
        """Adapters closed to everything behind ``sequence``, which was passed over too long, until it fits.

        Not to what is ahead of it: that keeps its adapters on the device and must run to let them go.
        """
        return self.slots.draining([a.rank for a in missing], {a.id for a in sequence.adaptation})

    def _draining_for_pins(self, now: float) -> set[AdapterId]:
        """Adapters closed to everything, where a pinned one has found no room for too long, until it fits."""
        absent = self._absent_pins()
        if not absent or now - self._pinned_at <= self.max_wait:
            return set()
        return self.slots.draining([absent[0].rank], ())

    def _absent_pins(self) -> list[WeightedAdapter]:
        return [adapted for adapted in self.owed.values() if adapted.id not in self.slots]

    def _take_blocks(self, sequence: Sequence) -> bool:
        """Prefix hits and room for the whole of what is known, or nothing at all.

        A probe computes its whole prompt: hits would change the shapes of its step.
        """
        hits: list[int] = []
        if not sequence.probe:
            chain_keys(sequence, self.blocks.size)
            hits = self.blocks.match(sequence.keys[: (len(sequence.tokens) - 1) // self.blocks.size])
        need = self.blocks.blocks_for(len(sequence.tokens)) - len(hits)
        if need + self.blocks.idle(hits) > self.blocks.free:
            return False
        self.blocks.share(hits)
        sequence.blocks = hits + self.blocks.allocate(need)
        sequence.computed = len(hits) * self.blocks.size
        return True

    def _start(self, sequence: Sequence, budget: int) -> Chunk:
        self.waiting.remove(sequence)
        self.running.append(sequence)
        self.running.sort(key=lambda running: running.arrived)
        trial = sequence.probe and not sequence.keep
        self.slots.lease((adapted.id for adapted in sequence.adaptation), trial=trial)
        sequence.leased = True
        if not sequence.preemptions:
            sequence.cached = sequence.computed
        return Chunk(sequence, sequence.computed, min(len(sequence.tokens) - sequence.computed, budget))

    # What a step leaves behind

    def _computed(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        sequence.computed = chunk.end
        if sequence.probe:
            return  # its prefix is of use to nobody else
        filled = range(chunk.start // self.blocks.size, chunk.end // self.blocks.size)
        if filled:
            chain_keys(sequence, self.blocks.size)
        for index in filled:
            self.blocks.publish(sequence.blocks[index], sequence.keys[index])

    def _append(self, sequence: Sequence, token: int | None, logits: bytes | None) -> Token | Failed:
        if token is None:
            self.release(sequence)
            return _not_finite(sequence)
        sequence.tokens.append(token)
        finish = _finish(sequence, token)
        if finish:
            self.release(sequence)
        return Token(sequence.id, token, finish, sequence.cached, logits)

    def _give_back(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0
        if sequence.leased:
            self.slots.release(adapted.id for adapted in sequence.adaptation)
            sequence.leased = False
            if sequence.probe:
                self.slots.demote(adapted.id for adapted in sequence.adaptation)

    def missing(self) -> Iterator[tuple[WeightedAdapter, set[AdapterId], Sequence | None]]:
        """Adapters to bring: pinned ones, then those that waiting sequences lack, in queue order.

        Each comes with the adapters that must stay for it, and with the sequence. What a sequence ahead in the queue
        waits for is never evicted for one behind it: a mix gathers its adapters one by one, and two mixes cannot take
        them from each other.
        """
        keep: set[AdapterId] = set()
        for adapted in self._absent_pins():
            yield adapted, keep, None
        for sequence in self.waiting:
            keep.update(adapted.id for adapted in sequence.adaptation)
            for adapted in sequence.adaptation:
                if adapted.id not in self.slots:
                    yield adapted, keep, sequence


def _not_finite(sequence: Sequence) -> Failed:
    if not sequence.adaptation:
        return Failed(sequence.id, "The model's output was not finite.")
    return Failed(sequence.id, "The model's output was not finite: this adapter or mix cannot be used.", "adapter")


def _finish(sequence: Sequence, token: int) -> FinishReason | None:
    if token in sequence.sampling.stop_token_ids:
        return "stop"
    return "length" if sequence.output_length >= sequence.sampling.max_tokens else None
