"""Which rows of a batch take which pages of which adapters."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from adapters.format.spec import AdapterId
from server.engine.sequence import Adaptation, Batch

T = TypeVar("T")

Placed = Mapping[AdapterId, tuple[tuple[int, ...], frozenset[str]]]
"""Adapter -> its pages and the layers it targets, for adapters on the device."""
Use = tuple[int, float]
"""A page, and the weight of its adapter in the row's mix."""


@dataclass(frozen=True)
class LoraSegment:
    """Rows ``[start, stop)`` of the packed batch and what they use of the pool.

    ``adaptations`` has one entry per row, or a single one that all rows share.
    """

    start: int
    stop: int
    adaptations: Sequence[Adaptation]
    placed: Placed

    def uses(self, adaptation: Adaptation) -> list[Use]:
        """The pages of an adaptation, in an order that does not depend on where they are."""
        return [(page, adapted.weight) for adapted in adaptation for page in self.placed[adapted.id][0]]

    def parts(self) -> Iterable[tuple[int, int, list[Use]]]:
        """First row, rows, and pages of rows with one adaptation that follow each other."""
        rows = (self.stop - self.start) // len(self.adaptations)
        for i, adaptation in enumerate(self.adaptations):
            yield self.start + i * rows, rows, self.uses(adaptation)


@dataclass(frozen=True, eq=False)
class LoraMapping:
    """What LoRA does in one step of ``rows`` rows. ``targets``: the layers that any adapter in the batch touches."""

    rows: int = 0
    segments: tuple[LoraSegment, ...] = ()
    targets: frozenset[str] = frozenset()
    derived: dict[Hashable, Any] = field(default_factory=dict)
    """A backend's own forms of it, by the backend's keys."""

    def once(self, key: Hashable, make: Callable[["LoraMapping"], T]) -> T:
        """``make(self)``, kept under ``key``: a backend's own form of the mapping, made once for all layers."""
        if key not in self.derived:
            self.derived[key] = make(self)
        found: T = self.derived[key]
        return found


def make_mapping(batch: Batch, placed: Placed) -> LoraMapping:
    """The segments of a batch: all single-token rows as one, each longer chunk by itself; base rows drop out."""
    rows = [chunk.length for chunk in batch.chunks]
    singles = sum(1 for length in rows if length == 1)
    segments = [(0, singles, [chunk.sequence.adaptation for chunk in batch.chunks[:singles]])]
    start = singles
    for chunk in batch.chunks[singles:]:
        segments.append((start, start + chunk.length, [chunk.sequence.adaptation]))
        start += chunk.length
    used = {adapted.id for chunk in batch.chunks for adapted in chunk.sequence.adaptation}
    return LoraMapping(
        batch.tokens,
        tuple(
            LoraSegment(first, last, adaptations, placed) for first, last, adaptations in segments if any(adaptations)
        ),
        frozenset().union(*(placed[adapter][1] for adapter in used)),
    )
