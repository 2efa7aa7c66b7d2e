"""Which rows of a batch take which pages of which adapters."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from adapters.format.spec import AdapterId
from server.engine.sequence import Adaptation, Batch

T = TypeVar("T")

WeightedPage = tuple[int, float]
"""A page, and the weight of its adapter in the row's mix."""
AdaptedRows = tuple[int, int, Sequence[WeightedPage]]
"""(First row of the batch, rows, pages of each): consecutive rows with one adaptation."""


class ResidentAdapter(NamedTuple):
    """An adapter on the device, or on its way there."""

    pages: tuple[int, ...]
    """In the order of its rank columns."""
    targets: frozenset[str]
    """Names of the linear layers that it changes."""


ResidentAdapters = Mapping[AdapterId, ResidentAdapter]


@dataclass(frozen=True)
class LoraSegment:
    """Rows ``[start, stop)`` of the packed batch and what they use of the pool.

    ``adaptations`` has one entry per row, or a single one that all rows share.
    """

    start: int
    stop: int
    adaptations: Sequence[Adaptation]
    resident: ResidentAdapters

    def weighted_pages(self, adaptation: Adaptation) -> list[WeightedPage]:
        """The pages of an adaptation, in an order that does not depend on where they are."""
        return [(page, adapted.weight) for adapted in adaptation for page in self.resident[adapted.id].pages]

    def adapted_rows(self) -> Iterable[AdaptedRows]:
        """The segment's rows, each run of them that shares one adaptation with its pages."""
        rows = (self.stop - self.start) // len(self.adaptations)
        for i, adaptation in enumerate(self.adaptations):
            yield self.start + i * rows, rows, self.weighted_pages(adaptation)


@dataclass(frozen=True, eq=False)
class LoraMapping:
    """What LoRA does in one step of ``rows`` rows. ``targets``: the layers that any adapter in the batch changes."""

    rows: int = 0
    segments: tuple[LoraSegment, ...] = ()
    targets: frozenset[str] = frozenset()
    derived: dict[Hashable, Any] = field(default_factory=dict)
    """A backend's own forms of it, by the backend's keys."""

    def derive(self, key: Hashable, make: Callable[["LoraMapping"], T]) -> T:
        """``make(self)``, cached under ``key``: a backend's own form of the mapping, made once for all layers."""
        if key not in self.derived:
            self.derived[key] = make(self)
        found: T = self.derived[key]
        return found


def make_mapping(batch: Batch, resident: ResidentAdapters) -> LoraMapping:
    """The segments of a batch: one for all single-token rows, one for each longer chunk, none for rows of the base."""
    rows = [chunk.length for chunk in batch.chunks]
    decode_rows = sum(1 for length in rows if length == 1)
    segments = [(0, decode_rows, [chunk.sequence.adaptation for chunk in batch.chunks[:decode_rows]])]
    start = decode_rows
    for chunk in batch.chunks[decode_rows:]:
        segments.append((start, start + chunk.length, [chunk.sequence.adaptation]))
        start += chunk.length
    used = {adapted.id for chunk in batch.chunks for adapted in chunk.sequence.adaptation}
    return LoraMapping(
        batch.tokens,
        tuple(
            LoraSegment(first, last, adaptations, resident) for first, last, adaptations in segments if any(adaptations)
        ),
        frozenset().union(*(resident[adapter].targets for adapter in used)),
    )
