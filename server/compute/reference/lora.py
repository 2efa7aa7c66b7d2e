"""LoRA for the rows of a batch by torch: two matrix products over a span of pages compute all rows at once.

For each span of pages that a segment's adapters occupy::

    h = x @ A[span].T          every row times every column in the span
    h = h * weight             a row keeps its own adapters' columns, times their weights; all others become 0
    y = y + h @ B[span]        B is scaled by alpha / r already

For rows with different adapters this computes columns that are then discarded. That is cheap where it happens: in
decode there are few rows, and most of the time goes into reading A and B, each of which is read once, without a gather
or a loop over adapters. A prefill chunk is a segment of its own and computes only its own columns. Mixed ranks and
mixes of adapters need no other code.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from server.compute.backend import GroupShape, PackedGroup
from server.compute.lora_mapping import LoraMapping, LoraSegment
from server.compute.transfer import to_device
from server.engine.slots import PAGE

MAX_GAP = 16
"""Pages of other adapters that a span may include. Discarding their columns is cheaper than two more products."""


@dataclass(frozen=True, slots=True)
class PageSpan:
    """Consecutive pages ``[start, stop)``, and each row's weight for each."""

    start: int
    stop: int
    weight: Tensor | None
    """[rows or 1, pages]; None if all weights are 1."""
    unused: Tensor | None
    """``weight == 0``. These columns are set to 0, not multiplied by it: 0 times another adapter's overflow is NaN."""


class TorchLora:
    """See :class:`server.compute.backend.GroupLora`. A [pages, layers, PAGE, in]; per layer B [pages, PAGE, out]."""

    def __init__(self, shape: GroupShape, pages: int, device: torch.device, dtype: torch.dtype) -> None:
        self.shape = shape
        self.pages = pages
        self.device = device
        self.dtype = dtype
        self.a: Tensor | None = None
        self.b: list[Tensor | None] = [None] * len(shape.outs)

    @property
    def reserved(self) -> frozenset[int]:
        """Layers that have memory."""
        return frozenset(i for i, b in enumerate(self.b) if b is not None)

    def pack(self, a: Tensor, bs: Sequence[Tensor | None]) -> PackedGroup:
        """The tensors as they are, contiguous."""
        return a.contiguous(), tuple(None if b is None else b.contiguous() for b in bs)

    def reserve(self, packed: PackedGroup) -> bool:
        """Zeros, so that pages that were never written are finite."""
        a, bs = packed
        missing = [i for i, b in enumerate(bs) if b is not None and self.b[i] is None]
        if self.a is None:
            self.a = self._zeros(self.pages, *a.shape[1:])
        for i in missing:
            b = bs[i]
            assert b is not None
            self.b[i] = self._zeros(self.pages, *b.shape[1:])
        return bool(missing)

    def copy_pairs(self, packed: PackedGroup | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """A and every B that has memory."""
        a, bs = packed or (None, (None,) * len(self.b))
        for pool, source in zip((self.a, *self.b), (a, *bs), strict=True):
            if pool is not None:
                yield pool, source

    def add(self, x: Tensor, outputs: Sequence[Tensor], active: Sequence[int], mapping: LoraMapping) -> None:
        """Two products for each span."""
        for segment, spans in mapping.derive(("spans", self.device, self.dtype), self._spans):
            rows = slice(segment.start, segment.stop)
            for span in spans:
                self._add_span(x[rows], [y[rows] for y in outputs], active, span)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, device=self.device, dtype=self.dtype)

    def _spans(self, mapping: LoraMapping) -> list[tuple[LoraSegment, tuple[PageSpan, ...]]]:
        return [(segment, _page_spans(segment, self.device, self.dtype)) for segment in mapping.segments]

    def _add_span(self, x: Tensor, outputs: Sequence[Tensor], active: Sequence[int], span: PageSpan) -> None:
        assert self.a is not None
        pages, rows = span.stop - span.start, x.shape[0]
        h = F.linear(x, self.a[span.start : span.stop].view(-1, self.shape.inputs)).view(rows, pages, -1)
        if span.weight is not None and span.unused is not None:
            h.mul_(span.weight.unsqueeze(-1)).masked_fill_(span.unused.unsqueeze(-1), 0)
        h = h.view(rows, pages, len(self.b), PAGE)
        for i in active:
            b = self.b[i]
            if b is not None:
                outputs[i].addmm_(h[:, :, i].reshape(rows, -1), b[span.start : span.stop].view(-1, self.shape.outs[i]))


def _page_spans(segment: LoraSegment, device: torch.device, dtype: torch.dtype) -> tuple[PageSpan, ...]:
    """The spans of a segment; with a single adaptation, one row of weights for all its rows."""
    adaptations = segment.adaptations
    weights: dict[int, list[float]] = {}
    for row, adaptation in enumerate(adaptations):
        for page, weight in segment.weighted_pages(adaptation):
            weights.setdefault(page, [0.0] * len(adaptations))[row] = weight
    spans = []
    for start, stop in _merged(sorted(weights)):
        zeros = [0.0] * len(adaptations)
        columns = [weights.get(page, zeros) for page in range(start, stop)]
        if all(weight == 1.0 for column in columns for weight in column):
            spans.append(PageSpan(start, stop, None, None))
        else:
            sent = to_device(columns, device, dtype).T.contiguous()
            spans.append(PageSpan(start, stop, sent, sent == 0))
    return tuple(spans)


def _merged(pages: Sequence[int]) -> Iterable[tuple[int, int]]:
    """Ranges ``[start, stop)`` that cover sorted ``pages``, joined across gaps of up to MAX_GAP pages."""
    start = previous = pages[0]
    for page in pages[1:]:
        if page - previous - 1 > MAX_GAP:
            yield start, previous + 1
            start = page
        previous = page
    yield start, previous + 1
