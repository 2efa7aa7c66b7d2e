"""Suspects: requests with the content of one that made a step fail. They run apart from all others until they pass.

A client that gets an error tries again with the same content. Without this, each try would cost the others of its
batch the steps in which it is found again.
"""

from collections import OrderedDict
from collections.abc import Iterable
from hashlib import sha256

from server.engine.sequence import Batch, Chunk, Sequence

MAX_KEPT = 256
"""Contents that are kept, the least recently seen are dropped first."""


def fingerprint(sequence: Sequence) -> bytes:
    """32 bytes that are equal for sequences that ask for the same: adapters, prompt, sampling, grammar."""
    if sequence.fingerprint is None:
        sequence.fingerprint = _fingerprint(sequence)
    return sequence.fingerprint


def _fingerprint(sequence: Sequence) -> bytes:
    parts = (
        [(adapter.id, adapter.weight) for adapter in sequence.adaptation],
        sequence.tokens[: sequence.prompt_length],
        sequence.sampling,
        (sequence.pooling, sequence.prompt_logprobs),
        id(sequence.grammar),  # compiled once for all requests that ask for the same
    )
    return sha256(repr(parts).encode()).digest()


class Suspects:
    """Contents that made a step fail. For one thread."""

    def __init__(self) -> None:
        self._failed: OrderedDict[bytes, int] = OrderedDict()
        """Fingerprint -> how many tokens were to be computed when it failed."""

    def __len__(self) -> int:
        return len(self._failed)

    def add(self, chunk: Chunk) -> bytes:
        """Suspect all that have the content of a chunk's sequence, up to the end of the chunk. Returns what it is."""
        found = fingerprint(chunk.sequence)
        self._failed[found] = chunk.end
        self._failed.move_to_end(found)
        if len(self._failed) > MAX_KEPT:
            self._failed.popitem(last=False)
        return found

    def passed(self, chunks: Iterable[Chunk]) -> None:
        """Take in that these chunks have run: whoever is past the place of the failure is suspected no more."""
        for chunk in chunks if self._failed else ():
            found = fingerprint(chunk.sequence)
            if chunk.end >= self._failed.get(found, chunk.end + 1):
                del self._failed[found]

    def split(self, batch: Batch) -> list[Batch]:
        """``batch`` without suspects, if that leaves any, and each suspect in a batch of its own."""
        if not self._failed:
            return [batch]
        alone = [chunk for chunk in batch.chunks if fingerprint(chunk.sequence) in self._failed]
        others = [chunk for chunk in batch.chunks if chunk not in alone]
        return [part_of(batch, chunks) for chunks in (others, *([chunk] for chunk in alone)) if chunks]


def part_of(batch: Batch, chunks: Iterable[Chunk]) -> Batch:
    """The batch of ``chunks``, which are some of ``batch``'s or shorter, with those new blocks that are theirs.

    So blocks that another part has written to since are not cleared again. Chunks of one token come first.
    """
    taken = tuple(sorted(chunks, key=lambda chunk: chunk.length > 1))
    own = {block for chunk in taken for block in chunk.sequence.blocks}
    return Batch(taken, tuple(block for block in batch.new_blocks if block in own))
