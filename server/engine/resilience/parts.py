"""Parts: runs a batch, and where that raises runs parts of it, until what fails is alone.

A step can be run again: it writes keys and values to the places of its own positions, and all else that it changes
(draws, penalties, grammars) is changed when its result is committed. So after a failure the batch runs in halves, and a
half that fails in halves again: with one sequence at fault among n, at most log2(n) + 1 more runs fail, and the others
get what they would have got.

Where memory is too small, the same batch runs with half of its rows: chunks of prompts are cut first, then the younger
half of the sequences waits for a later step.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from server.engine.resilience.out_of_memory import is_out_of_memory
from server.engine.resilience.suspects import Suspects, fingerprint, part_of
from server.engine.sequence import Batch, Chunk, Sequence, StepResult

log = logging.getLogger(__name__)

MAX_LOST = 8
"""Sequences that fail alone in one step, one after the other with none that runs, before the device is blamed."""


@dataclass(frozen=True, slots=True)
class Ran:
    """A part that has run. Commit it before the next part."""

    batch: Batch
    result: StepResult
    whole: bool
    """Whether it is the batch as it was scheduled."""


@dataclass(frozen=True, slots=True)
class Lost:
    """A sequence that failed alone, or has the content of one that did; or everything fails."""

    sequence: Sequence
    error: Exception
    blamed: bool = True
    """Whether the sequence is at fault, or its content, and not the device."""


@dataclass(frozen=True, slots=True)
class Deferred:
    """Sequences that memory has no room for in this step, youngest first. Preempt them."""

    sequences: tuple[Sequence, ...]


Outcome = Ran | Lost | Deferred


class Parts:
    """Runs batches with ``run``, which raises if the device or a sequence makes it fail.

    ``release_memory`` frees what can be freed without losing a request. For one thread.
    """

    def __init__(
        self, run: Callable[[Batch], StepResult], release_memory: Callable[[], None], suspects: Suspects
    ) -> None:
        self._run = run
        self._release_memory = release_memory
        self._suspects = suspects
        self.failures = 0
        """Runs that have raised."""
        self.out_of_memory = 0
        """Of those, the ones for lack of memory."""
        self._left: list[Batch] = []
        """The parts of the current batch that are still to run, the next one last."""
        self._released = False
        """Whether memory was released for the current batch."""

    def run(self, batch: Batch) -> Iterator[Outcome]:
        """Run ``batch``, in parts where it must be. Each of its sequences is in one outcome, or has lost its lease.

        Preempt and fail what an outcome names before the next one is asked for.
        """
        self._left = [*reversed(self._suspects.split(batch))]
        self._released, ran, lone = False, False, 0
        while self._left:
            part = _leased(self._left.pop())
            if not part.chunks:
                continue
            found = self._try(part)
            if isinstance(found, StepResult):
                ran = True
                self._suspects.passed(part.chunks)
                yield Ran(part, found, part is batch)
            elif is_out_of_memory(found):
                yield from self._shrink(part, found)
            elif len(part.chunks) > 1:
                half = (len(part.chunks) + 1) // 2
                self._left += [part_of(part, part.chunks[half:]), part_of(part, part.chunks[:half])]
            else:
                yield from self._lose(part.chunks[0], found)
                lone += 1
                if lone >= MAX_LOST and not ran:
                    yield from self._lose_all(found)

    def _try(self, part: Batch) -> StepResult | Exception:
        try:
            return self._run(part)
        except Exception as error:  # of any kind: whose fault it is, is what is to be found out
            self.failures += 1
            rows, sequences = part.tokens, len(part.chunks)
            if is_out_of_memory(error):
                self.out_of_memory += 1
                error.__traceback__ = None  # its frames keep what the step has allocated
            log.warning("A step of %d rows and %d sequences failed: %r", rows, sequences, error)
            return error

    def _shrink(self, part: Batch, error: Exception) -> Iterator[Lost | Deferred]:
        """Try again once what can be freed is freed, and then with less and less of the part."""
        if not self._released:
            self._released = True
            self._release_memory()
            self._left.append(part)
            return
        smaller, deferred = _smaller(part)
        if smaller is None:
            self._suspects.add(part.chunks[0])
            yield Lost(part.chunks[0].sequence, error)
            return
        if deferred:
            yield Deferred(deferred)
        self._left.append(smaller)

    def _lose(self, chunk: Chunk, error: Exception) -> Iterator[Lost]:
        """Lose a sequence that failed alone, and those of the same content without trying them."""
        same = self._suspects.add(chunk)
        yield Lost(chunk.sequence, error)
        others = (other.sequence for part in self._left for other in part.chunks)
        yield from [Lost(other, error) for other in others if fingerprint(other) == same]

    def _lose_all(self, error: Exception) -> Iterator[Lost]:
        sequences = [chunk.sequence for part in self._left for chunk in _leased(part).chunks]
        self._left = []
        yield from [Lost(sequence, error, blamed=False) for sequence in sequences]


def _leased(part: Batch) -> Batch:
    """``part`` without sequences that have ended since it was scheduled."""
    if all(chunk.sequence.leased for chunk in part.chunks):
        return part
    return part_of(part, (chunk for chunk in part.chunks if chunk.sequence.leased))


def _smaller(part: Batch) -> tuple[Batch | None, tuple[Sequence, ...]]:
    """``part`` with about half of its rows, and the sequences left out, youngest first. None if it has one row.

    A probe is never cut: all of them must have the same shapes.
    """
    if part.probe:
        return None, ()
    if part.tokens > len(part.chunks):
        return part_of(part, map(_shorter, part.chunks)), ()
    if len(part.chunks) == 1:
        return None, ()
    by_age = sorted(part.chunks, key=lambda chunk: chunk.sequence.arrived)
    half = (len(by_age) + 1) // 2
    younger = by_age[half:]
    kept = part_of(part, (chunk for chunk in part.chunks if chunk not in younger))
    return kept, tuple(chunk.sequence for chunk in reversed(younger))


def _shorter(chunk: Chunk) -> Chunk:
    """The first half of a chunk, without drafts."""
    length = chunk.length - len(chunk.drafts)
    return replace(chunk, length=max(1, length if chunk.drafts else length // 2), drafts=())
