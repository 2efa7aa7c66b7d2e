"""The plan of one batch: which rows take which pages of which adapters, as each way to compute it wants it told."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from adapters.spec import AdapterId
from server import cuda, native
from server.native.batches import TILE_ROWS
from server.sequence import Adaptation, Batch

if TYPE_CHECKING:
    from server.cuda.lora import LoraTiles

MAX_GAP = 16
"""Pages of strangers that are cheaper to compute and discard than a second pair of matrix products."""


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive pages ``[start, stop)`` and how much each row takes of each."""

    start: int
    stop: int
    weight: Tensor | None
    """[rows or 1, pages]; None where every row takes every page as it is."""
    absent: Tensor | None
    """``weight == 0``: columns to be set to 0 rather than multiplied, so that a stranger's overflow cannot leak."""


Placed = Mapping[AdapterId, tuple[tuple[int, ...], frozenset[str]]]
"""Adapter -> its pages and the layers it targets, for adapters on the device."""


@dataclass(frozen=True)
class Segment:
    """Rows ``[start, stop)`` of the packed batch and what they use of the pool.

    ``adaptations`` has one entry per row, or a single one that all rows share.
    """

    start: int
    stop: int
    adaptations: Sequence[Adaptation]
    placed: Placed
    like: Tensor
    """Of the pool's device and dtype."""

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """For the products over spans of pages."""
        return _spans(self.adaptations, self.placed, self.like)

    def groups(self) -> Iterable[tuple[list[int], list[tuple[int, float]]]]:
        """Up to 16 rows with one adaptation and its (page, weight) pairs, for the kernel."""
        taking: dict[Adaptation, list[int]] = {}
        if len(self.adaptations) == 1:
            taking[self.adaptations[0]] = list(range(self.start, self.stop))
        else:
            for row, adaptation in enumerate(self.adaptations, self.start):
                taking.setdefault(adaptation, []).append(row)
        for adaptation, rows in taking.items():
            uses = [(page, adapted.weight) for adapted in adaptation for page in self.placed[adapted.id][0]]
            for first in range(0, len(rows) if uses else 0, TILE_ROWS):
                yield rows[first : first + TILE_ROWS], uses

    def parts(self) -> Iterable[tuple[int, int, list[tuple[int, float]]]]:
        """First row, rows, and (page, weight) pairs of rows with one adaptation, for the kernels on CUDA."""
        rows = (self.stop - self.start) // len(self.adaptations)
        for i, adaptation in enumerate(self.adaptations):
            uses = [(page, adapted.weight) for adapted in adaptation for page in self.placed[adapted.id][0]]
            yield self.start + i * rows, rows, uses


@dataclass(frozen=True)
class Plan:
    """What LoRA does in one step of ``rows`` rows. ``targets``: the layers that any adapter in the batch touches."""

    rows: int = 0
    segments: tuple[Segment, ...] = ()
    targets: frozenset[str] = frozenset()
    given: "LoraTiles | None" = None
    """Where the buffers of a captured step say what rows take."""

    @cached_property
    def tiles(self) -> "LoraTiles":
        """What rows take, for the kernels on CUDA."""
        from server.cuda.lora import lora_tiles  # needs Triton

        parts = [part for segment in self.segments for part in segment.parts()]
        return self.given or lora_tiles(parts, self.segments[0].like.device)

    @cached_property
    def lora_rows(self) -> native.LoraRows:
        """All rows' pages, for the kernel."""
        return native.LoraRows([group for segment in self.segments for group in segment.groups()])


def make_plan(batch: Batch, placed: Placed, like: Tensor) -> Plan:
    """The segments of a batch: all single-token rows as one, each longer chunk by itself; base rows drop out."""
    rows = [chunk.length for chunk in batch.chunks]
    singles = sum(1 for length in rows if length == 1)
    segments = [(0, singles, [chunk.sequence.adaptation for chunk in batch.chunks[:singles]])]
    start = singles
    for chunk in batch.chunks[singles:]:
        segments.append((start, start + chunk.length, [chunk.sequence.adaptation]))
        start += chunk.length
    used = {adapted.id for chunk in batch.chunks for adapted in chunk.sequence.adaptation}
    return Plan(
        batch.tokens,
        tuple(
            Segment(first, last, adaptations, placed, like) for first, last, adaptations in segments if any(adaptations)
        ),
        frozenset().union(*{placed[adapter][1] for adapter in used}),
    )


def _spans(adaptations: Sequence[Adaptation], placed: Placed, like: Tensor) -> tuple[Span, ...]:
    """Spans for rows with these adaptations; a single adaptation stands for all rows of its segment."""
    weights: dict[int, list[float]] = {}
    for row, adaptation in enumerate(adaptations):
        for adapted in adaptation:
            for page in placed[adapted.id][0]:
                weights.setdefault(page, [0.0] * len(adaptations))[row] = adapted.weight
    spans = []
    for start, stop in _runs(sorted(weights)):
        none = [0.0] * len(adaptations)
        columns = [weights.get(page, none) for page in range(start, stop)]
        if all(weight == 1.0 for column in columns for weight in column):
            spans.append(Span(start, stop, None, None))
        else:
            weight = cuda.send(columns, like.device, like.dtype).T.contiguous()
            spans.append(Span(start, stop, weight, weight == 0))
    return tuple(spans)


def _runs(pages: Sequence[int]) -> Iterable[tuple[int, int]]:
    """Consecutive runs ``[start, stop)`` that cover sorted ``pages``, joined across gaps of up to MAX_GAP pages."""
    start = previous = pages[0]
    for page in pages[1:]:
        if page - previous - 1 > MAX_GAP:
            yield start, previous + 1
            start = page
        previous = page
    yield start, previous + 1
