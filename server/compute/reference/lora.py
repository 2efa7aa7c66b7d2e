"""LoRA for the rows of a batch by torch: two matrix products over a span of pages serve all rows at once.

For each span of pages that a segment's adapters occupy::

    h = x @ A[span].T          every row against every column in the span
    h = h * weight             a row keeps its own adapters' columns, times the mix's weights; all others become 0
    y = y + h @ B[span]        B carries alpha / r already

For rows with different adapters this computes columns it throws away. That is cheap where it happens (decode: few
rows, the time goes into reading A and B, and each is read once, without a gather and without a loop over adapters); a
chunk of prefill is a segment of its own and computes only its own columns. Mixed ranks and mixes of adapters need no
second path.
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
"""Pages of other adapters that are cheaper to compute and discard than a second pair of matrix products."""


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive pages ``[start, stop)`` and how much each row takes of each."""

    start: int
    stop: int
    weight: Tensor | None
    """[rows or 1, pages]; None where every row takes every page as it is."""
    absent: Tensor | None
    """``weight == 0``: columns to set to 0 rather than to multiply, so that another adapter's overflow cannot leak."""


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
        """As they are, each in one piece."""
        return a.contiguous(), tuple(None if b is None else b.contiguous() for b in bs)

    def reserve(self, packed: PackedGroup) -> bool:
        """Zeros: a page is finite from the start."""
        a, bs = packed
        missing = [i for i, b in enumerate(bs) if b is not None and self.b[i] is None]
        if self.a is None:
            self.a = self._zeros(self.pages, *a.shape[1:])
        for i in missing:
            b = bs[i]
            assert b is not None
            self.b[i] = self._zeros(self.pages, *b.shape[1:])
        return bool(missing)

    def tensors(self, packed: PackedGroup | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """A and every B that has memory."""
        a, bs = packed or (None, (None,) * len(self.b))
        for mine, theirs in zip((self.a, *self.b), (a, *bs), strict=True):
            if mine is not None:
                yield mine, theirs

    def add(self, x: Tensor, outputs: Sequence[Tensor], active: Sequence[int], mapping: LoraMapping) -> None:
        """Span by span."""
        for segment, spans in mapping.derive(("spans", self.device, self.dtype), self._spans):
            rows = slice(segment.start, segment.stop)
            for span in spans:
                self._add_span(x[rows], [y[rows] for y in outputs], active, span)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, device=self.device, dtype=self.dtype)

    def _spans(self, mapping: LoraMapping) -> list[tuple[LoraSegment, tuple[Span, ...]]]:
        return [(segment, _spans(segment, self.device, self.dtype)) for segment in mapping.segments]

    def _add_span(self, x: Tensor, outputs: Sequence[Tensor], active: Sequence[int], span: Span) -> None:
        assert self.a is not None
        pages, rows = span.stop - span.start, x.shape[0]
        h = F.linear(x, self.a[span.start : span.stop].view(-1, self.shape.inputs)).view(rows, pages, -1)
        if span.weight is not None and span.absent is not None:
            h.mul_(span.weight.unsqueeze(-1)).masked_fill_(span.absent.unsqueeze(-1), 0)
        h = h.view(rows, pages, len(self.b), PAGE)
        for i in active:
            b = self.b[i]
            if b is not None:
                outputs[i].addmm_(h[:, :, i].reshape(rows, -1), b[span.start : span.stop].view(-1, self.shape.outs[i]))


def _spans(segment: LoraSegment, device: torch.device, dtype: torch.dtype) -> tuple[Span, ...]:
    """Spans for the rows of a segment; a single adaptation stands for all of them."""
    adaptations = segment.adaptations
    weights: dict[int, list[float]] = {}
    for row, adaptation in enumerate(adaptations):
        for page, weight in segment.weighted_pages(adaptation):
            weights.setdefault(page, [0.0] * len(adaptations))[row] = weight
    spans = []
    for start, stop in _runs(sorted(weights)):
        none = [0.0] * len(adaptations)
        columns = [weights.get(page, none) for page in range(start, stop)]
        if all(weight == 1.0 for column in columns for weight in column):
            spans.append(Span(start, stop, None, None))
        else:
            sent = to_device(columns, device, dtype).T.contiguous()
            spans.append(Span(start, stop, sent, sent == 0))
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
